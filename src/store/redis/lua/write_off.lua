-- Counts entries as lost that a group was never given, unless someone has done so since they were missed.
-- KEYS: the stream, its account. ARGV: group, how many the account said were lost so, how many more are missing.
-- Returns 1 where they were counted.
local stream, account, group = KEYS[1], KEYS[2], ARGV[1]
local name = 'trimmed_undelivered:' .. group
if tonumber(redis.call('HGET', account, name) or 0) ~= tonumber(ARGV[2]) then return 0 end
if tonumber(ARGV[3]) > 0 then redis.call('HINCRBY', account, name, ARGV[3]) end
if redis.call('EXISTS', stream) == 1 then recount(stream, group) end
return 1
