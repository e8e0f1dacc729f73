package http2conn

import (
	"strconv"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// undeclared is the content length of a request without one.
const undeclared = -1

// checkRequest reports whether the header fields of a request follow RFC 9113, sections 8.2.2 and
// 8.3.1, and returns its content length, or undeclared. The framer has already checked what holds
// for responses, too: names in capitals, unknown and repeated pseudo-header fields.
func checkRequest(fields []hpack.HeaderField) (length int64, ok bool) {
	var method, scheme, path, authority string
	length = undeclared
	for _, f := range fields {
		switch f.Name {
		case ":method":
			method = f.Value
		case ":scheme":
			scheme = f.Value
		case ":path":
			path = f.Value
		case ":authority":
			authority = f.Value
		case "te":
			if f.Value != "trailers" {
				return 0, false
			}
		case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
			return 0, false
		case "content-length":
			n, err := strconv.ParseUint(f.Value, 10, 63)
			if err != nil || length != undeclared && int64(n) != length {
				return 0, false
			}
			length = int64(n)
		}
	}
	if method == "CONNECT" {
		return length, scheme == "" && path == "" && authority != ""
	}
	return length, method != "" && (scheme == "http" || scheme == "https") &&
		(strings.HasPrefix(path, "/") || path == "*" && method == "OPTIONS")
}
