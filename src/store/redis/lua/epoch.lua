-- Returns the epoch of a stream. Sets a new one if there is none, or if the stream was started again since the last
-- call: its last id went back, or its count of entries did.
-- KEYS: the stream, its epoch. ARGV: a fresh epoch. Returns the epoch.
local call, stream, key = redis.call, KEYS[1], KEYS[2]
local last, added = '0-0', '0'
if call('EXISTS', stream) == 1 then
  local info = call('XINFO', 'STREAM', stream)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then last = info[i + 1] end
    if info[i] == 'entries-added' then added = string.format('%.0f', info[i + 1]) end
  end
end
-- Returns whether a is smaller than b. Both are numbers of up to 20 digits, or ids made of two such numbers.
local function smaller(a, b)
  if #a ~= #b then return #a < #b end
  return a < b
end
local function less(a, b)
  local am, as = a:match('^(%d+)-(%d+)$')
  local bm, bs = b:match('^(%d+)-(%d+)$')
  if am ~= bm then return smaller(am, bm) end
  return smaller(as, bs)
end
local known = call('HMGET', key, 'epoch', 'last', 'added')
local epoch = known[1]
if not epoch or less(last, known[2]) or smaller(added, known[3]) then epoch = ARGV[1] end
if epoch ~= known[1] or last ~= known[2] or added ~= known[3] then
  local written = redis.pcall('HSET', key, 'epoch', epoch, 'last', last, 'added', added)
  -- A full or read-only server can still return an epoch that does not change.
  if type(written) == 'table' and written.err and epoch ~= known[1] then return written end
end
return epoch
