-- Begins a script that only the holder of a lease may run. Its last key is the lease, its last argument what that holds.
if redis.call('GET', table.remove(KEYS)) ~= table.remove(ARGV) then
  return redis.error_reply('LEASELOST the lease is held by another, or by no one')
end
