-- Appends entries, in order.
-- KEYS: the stream. ARGV: for each run of entries with the same names: how many names, the names, how many entries, and
--   the values of one entry after the other. Each argument costs the server time, so names are not repeated.
-- Returns the ids, parted by spaces.
local call, unpack, stream, last = redis.call, unpack, KEYS[1], #ARGV
local out, n, i = {}, 0, 1
while i <= last do
  local names = tonumber(ARGV[i])
  local args, top = {'XADD', stream, '*'}, 3 + 2 * names
  for k = 1, names do args[2 + 2 * k] = ARGV[i + k] end
  local entries = tonumber(ARGV[i + names + 1])
  i = i + names + 2
  for _ = 1, entries do
    for k = 5, top, 2 do
      args[k], i = ARGV[i], i + 1
    end
    n = n + 1
    out[n] = call(unpack(args, 1, top))
  end
end
return table.concat(out, ' ')
