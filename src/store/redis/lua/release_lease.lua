-- Releases a lease. KEYS: the lease. ARGV: its value. Returns 1 if it was still held.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
