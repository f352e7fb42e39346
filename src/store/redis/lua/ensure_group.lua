-- Creates a group, and its stream, if they are missing, and begins its account. KEYS: the stream, its account.
-- ARGV: group, '0', '$' or the id before its first entry. Returns 1 if the group was created.
local call, stream, account, group, start = redis.call, KEYS[1], KEYS[2], ARGV[1], ARGV[2]
local function find(groups)
  for _, known in ipairs(groups) do
    if field(known, 'name') == group then return known end
  end
end
local info, groups, read
if call('EXISTS', stream) == 1 then
  info, groups = call('XINFO', 'STREAM', stream), call('XINFO', 'GROUPS', stream)
  local known = find(groups)
  if known then
    open(account, info, known)
    return 0
  end
  -- A group that begins at the end has in effect read everything. With that number the server knows its lag later.
  -- Servers before 7.0 never know it.
  local added = field(info, 'entries-added')
  if start == '$' and added then read = text(added) end
end
if read then
  call('XGROUP', 'CREATE', stream, group, start, 'MKSTREAM', 'ENTRIESREAD', read)
else
  call('XGROUP', 'CREATE', stream, group, start, 'MKSTREAM')
end
-- Delete the account of an earlier group of that name, or of an earlier stream.
forget(account, group)
if not groups or #groups == 0 then call('HDEL', account, 'removed') end
open(account, call('XINFO', 'STREAM', stream), find(call('XINFO', 'GROUPS', stream)))
return 1
