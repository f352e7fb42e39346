-- Stores the idempotency key of the entry that the same transaction appended just before. A transaction continues after
-- a failed command, so the script stores nothing if the newest entry is another one.
-- KEYS: the stream, the key that stores the idempotency key. ARGV: the window in milliseconds, the event id, the number
--   of the entry's names and values, and the last four of these. Returns the entry's id.
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local size = tonumber(ARGV[3])
local is_it = last and #last[2] == size
for i = 1, 4 do is_it = is_it and last[2][size - 4 + i] == ARGV[3 + i] end
if not is_it then return redis.error_reply('ERR the entry was not appended') end
redis.call('SET', KEYS[2], last[1] .. ' ' .. ARGV[2], 'PX', ARGV[1])
return last[1]
