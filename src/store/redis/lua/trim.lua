-- Removes the oldest entries, but none that a group has not settled. One bounded step.
-- KEYS: the stream, its account. ARGV: 'length' and the number to keep, or 'before' and the smallest id to keep; then
--   the groups to ignore.
-- Returns how many were removed, and 1 if another step may remove more.
local call, stream, account = redis.call, KEYS[1], KEYS[2]
if call('EXISTS', stream) == 0 then return {0, 0} end

-- Returns the id after this one, or the id itself if its sequence number exceeds a Lua number; that keeps one more.
local function after(id)
  local ms, seq = id:match('^(%d+)-(%d+)$')
  if #seq > 15 then return id end
  return ms .. '-' .. string.format('%.0f', tonumber(seq) + 1)
end

local ignored = {}
for i = 3, #ARGV do ignored[ARGV[i]] = true end

-- The smallest id that a group has not settled.
local floor
local function consider(group)
  local needed = after(field(group, 'last-delivered-id'))
  if field(group, 'pending') > 0 then
    local oldest = call('XPENDING', stream, field(group, 'name'))[2]
    if oldest and less(oldest, needed) then needed = oldest end
  end
  if not floor or less(needed, floor) then floor = needed end
end
for _, group in ipairs(call('XINFO', 'GROUPS', stream)) do
  if not ignored[field(group, 'name')] then consider(group) end
end

local function done(removed, more)
  count_removed(account, removed)
  return {removed, more and removed > 0 and 1 or 0}
end

local length = call('XLEN', stream)
if ARGV[1] == 'before' then
  local id = ARGV[2]
  if floor and less(floor, id) then id = floor end
  local removed = call('XTRIM', stream, 'MINID', '~', id, 'LIMIT', 10000)
  return done(removed, true)
end

local keep = tonumber(ARGV[2])
if length <= keep then return {0, 0} end
local STEP = step(call('XINFO', 'STREAM', stream))
local kept_by_groups = 0
if floor then
  kept_by_groups = #call('XRANGE', stream, floor, '+', 'COUNT', STEP + 1)
end
if kept_by_groups <= STEP then
  local removed
  if kept_by_groups <= keep then
    removed = call('XTRIM', stream, 'MAXLEN', '~', keep, 'LIMIT', 10000)
  else
    removed = call('XTRIM', stream, 'MINID', '~', floor, 'LIMIT', 10000)
  end
  return done(removed, true)
end
-- Too many entries after the floor to count them: remove from the oldest on, up to the floor.
local want = math.min(length - keep, STEP)
local oldest = call('XRANGE', stream, '-', '+', 'COUNT', want + 1)
local cut = 0
while cut < want and oldest[cut + 1] and less(oldest[cut + 1][1], floor) do cut = cut + 1 end
if cut == 0 then return {0, 0} end
local removed = call('XTRIM', stream, 'MINID', oldest[cut + 1] and oldest[cut + 1][1] or floor)
return done(removed, cut == want)
