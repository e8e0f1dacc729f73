package rpc

import (
	"encoding/base64"
	"strconv"
	"strings"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// ContentType is that of gRPC.
const ContentType = "application/grpc"

// ReplyMetadata gathers the header and the trailer that a handler sets.
type ReplyMetadata struct {
	Header, Trailer metadata.MD
	Sent            bool // the header was sent
}

// SetHeader implements part of grpc.ServerStream.
func (r *ReplyMetadata) SetHeader(md metadata.MD) error {
	if r.Sent {
		return status.Error(codes.Internal, "the header was sent already")
	}
	r.Header = metadata.Join(r.Header, md)
	return nil
}

// SetTrailer implements part of grpc.ServerStream.
func (r *ReplyMetadata) SetTrailer(md metadata.MD) { r.Trailer = metadata.Join(r.Trailer, md) }

// Received is what a client of grpc-go makes of the metadata: the content type is in the header, or
// in the trailer of a response that has nothing else.
func (r *ReplyMetadata) Received() (header, trailer metadata.MD) {
	trailer = withoutReserved(r.Trailer)
	if r.Sent {
		header = withoutReserved(r.Header)
		header["content-type"] = []string{ContentType}
	} else {
		trailer["content-type"] = []string{ContentType}
	}
	return header, trailer
}

func withoutReserved(md metadata.MD) metadata.MD {
	out := make(metadata.MD, len(md)+1)
	for k, v := range md {
		if !IsReserved(k) {
			out[k] = v
		}
	}
	return out
}

// IsReserved reports whether gRPC does not hand a header field on as metadata.
func IsReserved(name string) bool {
	switch name {
	case "content-type", "user-agent", "grpc-message-type", "grpc-encoding", "grpc-message", "grpc-status", "grpc-timeout", "te":
		return true
	}
	return strings.HasPrefix(name, ":")
}

// IsBinaryName reports whether the values of a header field are base64.
func IsBinaryName(name string) bool { return strings.HasSuffix(name, "-bin") }

// MetadataFields appends metadata to header fields.
func MetadataFields(fields []hpack.HeaderField, md metadata.MD) []hpack.HeaderField {
	for k, all := range md {
		if IsReserved(k) {
			continue
		}
		for _, v := range all {
			if IsBinaryName(k) {
				v = base64.RawStdEncoding.EncodeToString([]byte(v))
			}
			fields = append(fields, hpack.HeaderField{Name: k, Value: v})
		}
	}
	return fields
}

// StatusFields appends a status to header fields.
func StatusFields(fields []hpack.HeaderField, st *status.Status) []hpack.HeaderField {
	fields = append(fields, hpack.HeaderField{Name: "grpc-status", Value: strconv.Itoa(int(st.Code()))}, hpack.HeaderField{Name: "grpc-message", Value: percent(st.Message())})
	if p := st.Proto(); len(p.GetDetails()) > 0 {
		if b, err := proto.Marshal(p); err == nil {
			fields = append(fields, hpack.HeaderField{Name: "grpc-status-details-bin", Value: base64.RawStdEncoding.EncodeToString(b)})
		}
	}
	return fields
}

// percent encodes a status message for its header, as gRPC has it.
func percent(text string) string {
	const hexDigits = "0123456789ABCDEF"
	var b strings.Builder
	for _, r := range text { // what is no UTF-8 becomes the replacement character
		for _, c := range []byte(string(r)) {
			if c >= ' ' && c <= '~' && c != '%' {
				b.WriteByte(c)
			} else {
				b.Write([]byte{'%', hexDigits[c>>4], hexDigits[c&15]})
			}
		}
	}
	return b.String()
}

// DecodeBinary decodes the value of a header field whose name ends in "-bin".
func DecodeBinary(v string) ([]byte, error) {
	if len(v)%4 == 0 {
		return base64.StdEncoding.DecodeString(v)
	}
	return base64.RawStdEncoding.DecodeString(v)
}
