package relay

import (
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// requestHead is what the header fields of a request say, as grpc-go's server reads them.
type requestHead struct {
	path, method string
	grpc         bool   // the content type is one of gRPC
	grpcLike     bool   // the content type has gRPC's in it
	subtype      string // what follows gRPC's content type
	otherType    string // a content type that is not gRPC's
	encoding     string // of compressed messages
	timeoutField string // the value of grpc-timeout; "" for none
	timeout      time.Duration
	authorities  int
	hosts        int
	connection   bool  // there is a header field of the connection
	fromProxy    bool  // another proxy or a command has sent it
	malformed    error // of a header field's value
}

// timeoutName is the header field with the time that a call may take. Its value differs for each
// call of a client that sets deadlines.
const timeoutName = "grpc-timeout"

func readRequestHead(fields []hpack.HeaderField) requestHead {
	var h requestHead
	for _, f := range fields {
		switch f.Name {
		case ":method":
			h.method = f.Value
		case ":path":
			h.path = f.Value
		case ":authority":
			h.authorities++
		case "host":
			h.hosts++
		case "content-type":
			h.grpcLike = h.grpcLike || strings.Contains(f.Value, rpc.ContentType)
			if rest, ok := strings.CutPrefix(f.Value, rpc.ContentType); ok && rest == "" {
				h.grpc, h.subtype = true, ""
			} else if ok && (rest[0] == '+' || rest[0] == ';') {
				h.grpc, h.subtype = true, rest[1:]
			} else {
				h.otherType = f.Value
			}
		case "grpc-encoding":
			h.encoding = f.Value
		case timeoutName:
			h.setTimeout(f.Value)
		case "connection":
			h.connection = true
		case upstream.MarkHeader:
			h.fromProxy = true
		default:
			if !rpc.IsBinaryName(f.Name) {
				continue
			}
			if _, err := rpc.DecodeBinary(f.Value); err != nil {
				h.malformed = status.Errorf(codes.Internal, "malformed binary metadata %q in header %q: %v", f.Value, f.Name, err)
			}
		}
	}
	return h
}

// setTimeout takes the value of grpc-timeout.
func (h *requestHead) setTimeout(field string) {
	var err error
	h.timeoutField = field
	if h.timeout, err = timeoutOf(field); err != nil {
		h.malformed = status.Errorf(codes.Internal, "malformed grpc-timeout: %v", err)
	}
}

// invalid returns the error for a request that grpc-go's server does not serve, and the status of
// HTTP that comes with it.
func (h *requestHead) invalid() (httpStatus int, err error) {
	switch {
	case h.authorities > 1 || h.hosts > 1:
		return http.StatusBadRequest, status.Errorf(codes.Internal, "num values of :authority: %d, num values of host: %d, both must only have 1 value as per HTTP/2 spec", h.authorities, h.hosts)
	case !h.grpc:
		return http.StatusUnsupportedMediaType, status.Errorf(codes.InvalidArgument, "invalid gRPC request content-type %q", h.otherType)
	case h.malformed != nil:
		return http.StatusBadRequest, h.malformed
	case h.authorities+h.hosts == 0:
		return http.StatusBadRequest, status.Error(codes.Internal, "no host or :authority header present")
	case h.method != http.MethodPost:
		return http.StatusMethodNotAllowed, status.Errorf(codes.Internal, "Received a HEADERS frame with :method %q which should be POST", h.method)
	case h.timeoutField != "" && h.timeout <= 0:
		return http.StatusOK, status.Error(codes.DeadlineExceeded, "context deadline exceeded")
	}
	return 0, nil
}

// relayable reports whether a request is like those of etcd's clients, so that its frames can be
// relayed.
func (h *requestHead) relayable() bool {
	return (h.subtype == "" || h.subtype == "proto") && (h.encoding == "" || h.encoding == encoding.Identity) && h.authorities == 1
}

// compressor returns the one that the request names, and nil for none.
func (h *requestHead) compressor() (encoding.Compressor, error) {
	if h.encoding == "" || h.encoding == encoding.Identity {
		return nil, nil
	}
	c := encoding.GetCompressor(h.encoding)
	if c == nil {
		return nil, status.Errorf(codes.Unimplemented, "grpc: Decompressor is not installed for grpc-encoding %q", h.encoding)
	}
	return c, nil
}

// responseType is the content type of the response.
func (h *requestHead) responseType() string {
	if h.subtype == "" {
		return rpc.ContentType
	}
	return rpc.ContentType + "+" + h.subtype
}

// incomingMetadata makes metadata of the header fields of a valid request.
func incomingMetadata(fields []hpack.HeaderField) metadata.MD {
	md := make(metadata.MD, len(fields))
	for _, f := range fields {
		if rpc.IsReserved(f.Name) && f.Name != ":authority" && f.Name != "user-agent" {
			continue
		}
		v := f.Value
		if rpc.IsBinaryName(f.Name) {
			b, err := rpc.DecodeBinary(v)
			if err != nil {
				continue // readRequestHead has refused it
			}
			v = string(b)
		}
		md[f.Name] = append(md[f.Name], v)
	}
	if len(md[":authority"]) == 0 {
		md[":authority"] = md["host"]
	}
	delete(md, "host")
	return md
}

// timeoutOf returns how long a call may take, by the value of grpc-timeout.
func timeoutOf(field string) (time.Duration, error) {
	switch {
	case len(field) < 2:
		return 0, fmt.Errorf("transport: timeout string is too short: %q", field)
	case len(field) > 9:
		return 0, fmt.Errorf("transport: timeout string is too long: %q", field)
	}
	var unit time.Duration
	switch field[len(field)-1] {
	case 'H':
		unit = time.Hour
	case 'M':
		unit = time.Minute
	case 'S':
		unit = time.Second
	case 'm':
		unit = time.Millisecond
	case 'u':
		unit = time.Microsecond
	case 'n':
		unit = time.Nanosecond
	default:
		return 0, fmt.Errorf("transport: timeout unit is not recognized: %q", field)
	}
	n, err := strconv.ParseUint(field[:len(field)-1], 10, 64)
	if err != nil {
		return 0, err
	}
	return time.Duration(min(n, uint64(math.MaxInt64/unit))) * unit, nil //nolint:gosec // 63 bits
}
