-- Counts undelivered entries of a group as lost, unless another instance has counted them meanwhile.
-- KEYS: the stream, its account. ARGV: group, the known number of such losses, the number of missing entries.
-- Returns 1 if they were counted.
local stream, account, group = KEYS[1], KEYS[2], ARGV[1]
local name = 'trimmed_undelivered:' .. group
if tonumber(redis.call('HGET', account, name) or 0) ~= tonumber(ARGV[2]) then return 0 end
if tonumber(ARGV[3]) > 0 then redis.call('HINCRBY', account, name, ARGV[3]) end
if redis.call('EXISTS', stream) == 1 then recount(stream, group) end
return 1
