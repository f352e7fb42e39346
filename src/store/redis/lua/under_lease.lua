-- The first lines of a script that needs a lease. Its last key is the lease, its last argument the lease's value.
if redis.call('GET', table.remove(KEYS)) ~= table.remove(ARGV) then
  return redis.error_reply('LEASELOST the lease is held by another, or by no one')
end
