-- Appends dead letters of entries that are in another part of the cluster, each once. A second run appends nothing, as
-- long as the first letter is there: one that was replayed or discarded meanwhile is no reason to lose another.
-- KEYS: the stream of dead letters; then for each letter, in order, where it is remembered.
-- ARGV: for how many milliseconds it is remembered, then per letter the number of its names and values, and these.
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
