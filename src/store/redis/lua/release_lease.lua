-- Gives up a lease. KEYS: the lease. ARGV: what it holds. Returns 1 where it was still held.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
