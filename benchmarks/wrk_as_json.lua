-- Have wrk print what it has found as JSON.
function done(summary, latency, requests)
  local errors = summary.errors
  local number = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format(
    '\nJSON {"bytes": %d, "requests": %d, "seconds": %f, "errors": %d, "first error": "%s"}\n',
    summary.bytes, summary.requests, summary.duration / 1e6, number,
    string.format("connect %d, read %d, write %d, status %d, timeout %d", errors.connect,
      errors.read, errors.write, errors.status, errors.timeout)))
end
