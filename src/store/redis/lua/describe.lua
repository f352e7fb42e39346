-- Describes a stream and its groups at one instant. KEYS: the stream, its account.
-- Returns nil if there is no stream, else XINFO STREAM, per group the row of XINFO GROUPS, the oldest pending id and
-- XINFO CONSUMERS, and the account.
local call, stream = redis.call, KEYS[1]
if call('EXISTS', stream) == 0 then return false end
local groups = {}
local info = call('XINFO', 'STREAM', stream)
for i = 1, #info, 2 do
  -- Keep only the ids of the first and last entry, not their bodies.
  if info[i] == 'first-entry' or info[i] == 'last-entry' then info[i + 1] = info[i + 1] and info[i + 1][1] or '' end
end
for n, group in ipairs(call('XINFO', 'GROUPS', stream)) do
  local name
  for i = 1, #group, 2 do
    if group[i] == 'name' then name = group[i + 1] end
  end
  local oldest = call('XPENDING', stream, name)[2] or ''
  groups[n] = {group, oldest, call('XINFO', 'CONSUMERS', stream, name)}
end
return {info, groups, call('HGETALL', KEYS[2])}
