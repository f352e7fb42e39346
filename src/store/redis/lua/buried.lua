-- Whether the letters of entries in another part of the cluster are there.
-- KEYS: the stream of dead letters; then for each letter, in order, where it is remembered. Returns 1 or 0 for each.
local found = {}
for k = 2, #KEYS do
  local id = redis.call('GET', KEYS[k])
  found[k - 1] = id and #redis.call('XRANGE', KEYS[1], id, id) or 0
end
return found
