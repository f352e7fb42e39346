-- Appends entries, in order. An entry with a known idempotency key is not appended again.
-- KEYS: the stream; then for each entry with an idempotency key, in order, the key that stores it.
-- ARGV: per entry the number of its names and values, then these. A negative number means that the window in
--   milliseconds and the event id come before them.
-- Returns per entry its id, or "=<id> <event id>" of the first entry with its key.
local call, unpack, stream, last = redis.call, unpack, KEYS[1], #ARGV
local out, n, i = {}, 0, 1
local known = {}
for k = 2, #KEYS do
  known[KEYS[k]] = call('GET', KEYS[k])
end
local k = 1
while i <= last do
  local size = tonumber(ARGV[i])
  n = n + 1
  if size >= 0 then
    out[n] = call('XADD', stream, '*', unpack(ARGV, i + 1, i + size))
    i = i + 1 + size
  else
    size = -size
    k = k + 1
    local key = KEYS[k]
    if known[key] then
      out[n] = '=' .. known[key]
    else
      local id = call('XADD', stream, '*', unpack(ARGV, i + 3, i + 2 + size))
      known[key] = id .. ' ' .. ARGV[i + 2]
      call('SET', key, known[key], 'PX', ARGV[i + 1])
      out[n] = id
    end
    i = i + 3 + size
  end
end
return out
