-- Removes a consumer with nothing pending. KEYS: the stream. ARGV: group, consumer. Returns 1 if it was removed.
local call, stream, group, consumer = redis.call, KEYS[1], ARGV[1], ARGV[2]
for _, info in ipairs(call('XINFO', 'CONSUMERS', stream, group)) do
  local name, pending
  for i = 1, #info, 2 do
    if info[i] == 'name' then name = info[i + 1] end
    if info[i] == 'pending' then pending = info[i + 1] end
  end
  if name == consumer then
    if pending > 0 then return 0 end
    call('XGROUP', 'DELCONSUMER', stream, group, consumer)
    return 1
  end
end
return 0
