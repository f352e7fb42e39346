-- Makes a group, and its stream, where there is none. KEYS: the stream. ARGV: group, '0', '$' or the id before its
-- first entry. Returns 1 where the group was made.
local call, stream, group, start = redis.call, KEYS[1], ARGV[1], ARGV[2]
local read
if call('EXISTS', stream) == 1 then
  for _, known in ipairs(call('XINFO', 'GROUPS', stream)) do
    for i = 1, #known, 2 do
      if known[i] == 'name' and known[i + 1] == group then return 0 end
    end
  end
  if start == '$' then
    -- A group that begins at the end has, in effect, read all there was. Told so, the server can tell its lag later;
    -- those before 7.0 never can.
    local info = call('XINFO', 'STREAM', stream)
    for i = 1, #info, 2 do
      if info[i] == 'entries-added' then read = string.format('%.0f', info[i + 1]) end
    end
  end
end
if read then
  call('XGROUP', 'CREATE', stream, group, start, 'MKSTREAM', 'ENTRIESREAD', read)
else
  call('XGROUP', 'CREATE', stream, group, start, 'MKSTREAM')
end
return 1
