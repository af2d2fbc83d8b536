-- wrk's script: posts the file named after `--` as the form's part "image", and prints what it counted as JSON.

function init(args)
  local file = assert(io.open(args[1], "rb"))
  local image = file:read("*a")
  file:close()
  local boundary = "safelight-benchmark-boundary"
  local head = 'Content-Disposition: form-data; name="image"; filename="image.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "multipart/form-data; boundary=" .. boundary
  wrk.body = "--" .. boundary .. "\r\n" .. head .. image .. "\r\n--" .. boundary .. "--\r\n"
end

function done(summary, latency, requests)
  local failed = summary.errors
  io.write(string.format(
    '{"requests": %d, "microseconds": %d, "p50_us": %d, "p99_us": %d, ' ..
    '"errors": {"connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d}}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    failed.connect, failed.read, failed.write, failed.status, failed.timeout))
end
