-- Acknowledges entries without an ownership check, and counts those that were pending.
-- KEYS: the stream, its account. ARGV: group, the counter, and the ids as MessagePack.
-- Returns how many were pending.
-- A full server lets a script continue after its first write, so the count comes after the acknowledgement.
local group = ARGV[1]
local count = redis.call('XACK', KEYS[1], group, cmsgpack.unpack(ARGV[3]))
if count > 0 then redis.call('HINCRBY', KEYS[2], ARGV[2] .. group, count) end
return count
