-- Functions shared by the scripts that keep accounts. The account of a stream is one hash: `<counter>:<group>` counts a
-- group's entries, `base:<group>` is the start of its account, and `removed` counts the entries that the store itself
-- removed from the stream.
local COUNTERS = {'acknowledged', 'filtered', 'dead', 'trimmed_pending', 'trimmed_undelivered', 'dropped', 'damaged'}

local function field(flat, name)
  for i = 1, #flat, 2 do
    if flat[i] == name then return flat[i + 1] end
  end
end

-- Returns whether id a is smaller than id b. Their parts have up to 20 digits, more than a Lua number can hold.
local function less(a, b)
  local am, as = a:match('^(%d+)-(%d+)$')
  local bm, bs = b:match('^(%d+)-(%d+)$')
  if #am ~= #bm then return #am < #bm end
  if am ~= bm then return am < bm end
  if #as ~= #bs then return #as < #bs end
  return as < bs
end

local function text(number) return string.format('%.0f', number) end

-- Returns the number of entries after a group's last delivered one, or nil if the server does not know. At both ends of
-- the stream the number is certain; in between, the server's own count includes removed entries.
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

-- Deletes the counters of a group.
local function forget(account, group)
  redis.call('HDEL', account, 'base:' .. group, unpack(counters(group)))
end

-- Begins a balanced account of a group, and that of the stream, if there is none. Does nothing while the server does not
-- know the number of entries, or while it is full.
local function open(account, info, group)
  local added, name = field(info, 'entries-added'), field(group, 'name')
  if not added then return end
  local base = redis.call('HGET', account, 'base:' .. name)
  if base and tonumber(base) <= added then return end
  -- More than was ever added: the stream was lost and started again.
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

-- After undelivered entries of a group are removed, the server's lag count is wrong until the group reaches the end of
-- the stream. This makes the server estimate it again where the estimate is right: at both ends. Setting a number would
-- be worse: when Redis 7.0 loads its append-only file it forgets the reads after that, but not the number.
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

-- Returns how many entries a script may read at once: fewer if entries are so large that few of them share a node.
local function step(info)
  local per_node = field(info, 'length') / math.max(field(info, 'radix-tree-nodes'), 1)
  return math.floor(math.max(20, math.min(1000, per_node * 20)))
end

-- Counts entries that the store itself removed, if the stream's account has begun.
local function count_removed(account, removed)
  if removed > 0 and redis.call('HEXISTS', account, 'removed') == 1 then
    redis.call('HINCRBY', account, 'removed', removed)
  end
end
