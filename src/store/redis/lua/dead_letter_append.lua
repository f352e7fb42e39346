-- Appends dead letters of entries in another slot, each once. A repeated run appends nothing while the first dead letter
-- exists. If it was replayed or discarded meanwhile, it is appended again, so that nothing is lost.
-- KEYS: the dead-letter stream; then for each dead letter, in order, its marker key.
-- ARGV: the lifetime of the markers in milliseconds, then per dead letter the number of its names and values, and these.
local call, unpack, dead, kept = redis.call, unpack, KEYS[1], ARGV[1]
local i = 2
for k = 2, #KEYS do
  local size = tonumber(ARGV[i])
  local known = call('GET', KEYS[k])
  if not known or #call('XRANGE', dead, known, known) == 0 then
    local id = call('XADD', dead, '*', unpack(ARGV, i + 1, i + size))
    call('SET', KEYS[k], id, 'PX', kept)
  end
  i = i + 1 + size
end
return #KEYS - 1
