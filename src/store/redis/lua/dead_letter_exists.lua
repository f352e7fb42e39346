-- Checks whether the dead letters of entries in another slot exist.
-- KEYS: the dead-letter stream; then for each dead letter, in order, its marker key. Returns 1 or 0 for each.
local found = {}
for k = 2, #KEYS do
  local id = redis.call('GET', KEYS[k])
  found[k - 1] = id and #redis.call('XRANGE', KEYS[1], id, id) or 0
end
return found
