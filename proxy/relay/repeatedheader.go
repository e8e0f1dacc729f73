package relay

import (
	"sync/atomic"

	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
)

// maxRepeated is how many header lists of a client's connection are remembered.
const maxRepeated = 8

// repeatedHeader is a header list that a client has sent more than once, with what was made of it.
type repeatedHeader struct {
	fields   []hpack.HeaderField
	head     requestHead
	method   *etcdapi.Method                       // nil if it is unknown
	upstream []atomic.Pointer[[]hpack.HeaderField] // for each endpoint, see [upstreamFields]
}

// repeatedHeaders are the last header lists that a client has repeated. http2conn returns the same
// slice for a header block that it remembers, so lists are compared by their addresses. Only the
// goroutine that reads from the client uses it.
type repeatedHeaders struct {
	known    [maxRepeated]*repeatedHeader
	once     [maxRepeated]*hpack.HeaderField // the first fields of lists that came once
	nextSlot uint8                           // of known
	nextOnce uint8
}

// repeated returns what is known of a header list, or nil when it comes for the first time.
func (s *session) repeated(fields []hpack.HeaderField) *repeatedHeader {
	r := &s.headers
	if len(fields) == 0 {
		return nil
	}
	first := &fields[0]
	for _, k := range r.known {
		if k != nil && &k.fields[0] == first && len(k.fields) == len(fields) {
			return k
		}
	}
	for i, once := range r.once {
		if once != first {
			continue
		}
		k := &repeatedHeader{
			fields: fields, head: readRequestHead(fields), upstream: make([]atomic.Pointer[[]hpack.HeaderField], len(s.endpoints)),
		}
		k.method = s.engine.api.Method(k.head.path)
		r.once[i] = nil
		r.known[r.nextSlot] = k
		r.nextSlot = (r.nextSlot + 1) % maxRepeated
		return k
	}
	r.once[r.nextOnce] = first
	r.nextOnce = (r.nextOnce + 1) % maxRepeated
	return nil
}

// upstreamFields returns the header fields of the call for an endpoint of etcd.
func (st *clientStream) upstreamFields(h *endpointState) []hpack.HeaderField {
	if st.repeated != nil {
		if fields := st.repeated.upstream[h.index].Load(); fields != nil {
			return *fields
		}
	}
	scheme, authority := st.session.id.Upstream.Origin(h.url)
	fields := upstreamFields(st.fields, scheme, authority)
	if st.repeated != nil {
		st.repeated.upstream[h.index].Store(&fields)
	}
	return fields
}
