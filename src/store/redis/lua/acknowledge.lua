-- Acknowledges entries without asking who owns them, and counts those that were pending.
-- KEYS: the stream, its account. ARGV: group, the counter, and the ids as MessagePack.
-- Returns how many were pending.
-- A server that is full lets a script go on that has written: so the count comes after the acknowledgement.
local group = ARGV[1]
local count = redis.call('XACK', KEYS[1], group, cmsgpack.unpack(ARGV[3]))
if count > 0 then redis.call('HINCRBY', KEYS[2], ARGV[2] .. group, count) end
return count
