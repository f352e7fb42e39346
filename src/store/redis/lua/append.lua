-- Appends entries, in order.
-- KEYS: the stream. ARGV: for each run of entries with the same names: the number of names; per name the name and the
--   value that the whole run shares, empty if values differ; the indexes of names with differing values, separated by
--   spaces; the number of entries; and the differing values, entry by entry. Each argument costs the server and the
--   client time, so nothing is repeated.
-- Returns the ids, separated by spaces.
local call, unpack, v, last = redis.call, unpack, ARGV, #ARGV
local out, n, i = {}, 0, 1
while i <= last do
  local width = 3 + 2 * tonumber(v[i])
  local command = {'XADD', KEYS[1], '*', unpack(v, i + 1, i + width - 3)}
  i = i + width - 2
  local places, differing = {}, 0
  for place in string.gmatch(v[i], '%d+') do
    differing = differing + 1
    places[differing] = 3 + 2 * place
  end
  local entries = tonumber(v[i + 1])
  i = i + 2
  for _ = 1, entries do
    for k = 1, differing do
      command[places[k]] = v[i]
      i = i + 1
    end
    n = n + 1
    out[n] = call(unpack(command, 1, width))
  end
end
return table.concat(out, ' ')
