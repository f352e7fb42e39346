-- Takes a lease, or renews it for who holds it.
-- KEYS: the lease, the count of leases taken. ARGV: the holder, for how long in milliseconds.
-- Returns the fence; where another holds the lease, who, and for how many more milliseconds.
local call, lease = redis.call, KEYS[1]
local held = call('GET', lease)
if held then
  local fence, holder = held:match('^(%d+) (.*)$')
  if not fence then return {'', held, call('PTTL', lease)} end
  if holder ~= ARGV[1] then return {'', holder, call('PTTL', lease)} end
  call('PEXPIRE', lease, ARGV[2])
  return {fence, '', 0}
end
local fence = string.format('%.0f', call('INCR', KEYS[2]))
call('SET', lease, fence .. ' ' .. ARGV[1], 'PX', ARGV[2])
return {fence, '', 0}
