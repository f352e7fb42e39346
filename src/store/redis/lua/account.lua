-- What the scripts share that keep accounts. A stream's account is one hash: `<counter>:<group>` for what became of
-- a group's entries, `base:<group>` for where its account begins, and `removed` for the entries that the store itself
-- removed from the stream.
local COUNTERS = {'acknowledged', 'filtered', 'dead', 'trimmed_pending', 'trimmed_undelivered', 'dropped', 'damaged'}

local function field(flat, name)
  for i = 1, #flat, 2 do
    if flat[i] == name then return flat[i + 1] end
  end
end

-- Whether id a is smaller than id b. Their parts have up to 20 digits, more than a number of Lua can hold.
local function less(a, b)
  local am, as = a:match('^(%d+)-(%d+)$')
  local bm, bs = b:match('^(%d+)-(%d+)$')
  if #am ~= #bm then return #am < #bm end
  if am ~= bm then return am < bm end
  if #as ~= #bs then return #as < #bs end
  return as < bs
end

local function text(number) return string.format('%.0f', number) end

-- How many entries there are after a group's last delivered one; nothing where the server can't tell. At both ends of
-- the stream that is certain; the server's own count in between also counts entries that are gone.
local function undelivered(info, group)
  local delivered = field(group, 'last-delivered-id')
  local first, last = field(info, 'first-entry'), field(info, 'last-entry')
  if not last or not less(delivered, last[1]) then return 0 end
  if less(delivered, first[1]) then return field(info, 'length') end
  return field(group, 'lag') or nil
end

local function counters(group)
  local names = {}
  for i, counter in ipairs(COUNTERS) do names[i] = counter .. ':' .. group end
  return names
end

-- Forgets what became of a group's entries.
local function forget(account, group)
  redis.call('HDEL', account, 'base:' .. group, unpack(counters(group)))
end

-- Begins a group's account where it has none, such that it adds up now, and the stream's. Nothing is begun while the
-- server can't tell how many entries there were, nor while it is full.
local function open(account, info, group)
  local added, name = field(info, 'entries-added'), field(group, 'name')
  if not added then return end
  local base = redis.call('HGET', account, 'base:' .. name)
  if base and tonumber(base) <= added then return end
  -- More than was ever added: the stream was lost and begun anew.
  if base then forget(account, name) end
  local there = undelivered(info, group)
  if not there then return end
  local found = field(group, 'pending') + there
  for _, count in ipairs(redis.call('HMGET', account, unpack(counters(name)))) do
    found = found + (tonumber(count) or 0)
  end
  redis.pcall('HSET', account, 'base:' .. name, text(math.max(added - found, 0)))
  redis.pcall('HSETNX', account, 'removed', text(added - field(info, 'length')))
end

-- After entries are gone that a group was never given, the server's count of what it still has to be given is wrong
-- until the group comes to the end of the stream. Has the server estimate it anew where it can do so rightly: at both
-- ends. Telling it a number would be worse: Redis 7.0 forgets what was read since when it loads its append-only file,
-- but not that number, and would count from there.
local function recount(stream, group)
  local info, row = redis.call('XINFO', 'STREAM', stream)
  for _, known in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    if field(known, 'name') == group then row = known end
  end
  if not row then return end
  local delivered, lag = field(row, 'last-delivered-id'), field(row, 'lag')
  local first, last = field(info, 'first-entry'), field(info, 'last-entry')
  if last and less(delivered, last[1]) and not less(delivered, first[1]) then return end
  if lag and lag ~= undelivered(info, row) then redis.call('XGROUP', 'SETID', stream, group, delivered) end
end

-- How many entries a script may read at once: fewer where they are so large that few of them share a node.
local function step(info)
  local per_node = field(info, 'length') / math.max(field(info, 'radix-tree-nodes'), 1)
  return math.floor(math.max(20, math.min(1000, per_node * 20)))
end

-- Counts what the store itself removed, where the stream's account has begun.
local function count_removed(account, removed)
  if removed > 0 and redis.call('HEXISTS', account, 'removed') == 1 then
    redis.call('HINCRBY', account, 'removed', removed)
  end
end
