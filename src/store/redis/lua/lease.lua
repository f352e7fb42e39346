-- Takes a lease, or renews it for its holder.
-- KEYS: the lease, the counter of fences. ARGV: the holder, the time to live in milliseconds.
-- Returns the fence, or if another holder has the lease, that holder and the milliseconds left.
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
