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
