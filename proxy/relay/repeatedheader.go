package relay

import (
	"sync/atomic"

	"golang.org/x/net/http2/hpack"
)

// maxRepeated is how many header lists of a client's connection are remembered.
const maxRepeated = 8

// repeatedHeader is a header list that a client has sent more than once, with what was made of it.
type repeatedHeader struct {
	fields   []hpack.HeaderField
	head     requestHead
	upstream atomic.Pointer[upstreamHeader]
}

// upstreamHeader is a header list for etcd, see [upstreamFields].
type upstreamHeader struct {
	scheme, authority string
	fields            []hpack.HeaderField
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

// find returns what is known of a header list, or nil when it comes for the first time.
func (r *repeatedHeaders) find(fields []hpack.HeaderField) *repeatedHeader {
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
		k := &repeatedHeader{fields: fields, head: readRequestHead(fields)}
		r.once[i] = nil
		r.known[r.nextSlot] = k
		r.nextSlot = (r.nextSlot + 1) % maxRepeated
		return k
	}
	r.once[r.nextOnce] = first
	r.nextOnce = (r.nextOnce + 1) % maxRepeated
	return nil
}

// upstreamFields returns the header fields of the call for etcd.
func (st *clientStream) upstreamFields(scheme, authority string) []hpack.HeaderField {
	if st.repeated == nil {
		return upstreamFields(st.fields, scheme, authority)
	}
	u := st.repeated.upstream.Load()
	if u == nil || u.scheme != scheme || u.authority != authority {
		u = &upstreamHeader{scheme, authority, upstreamFields(st.fields, scheme, authority)}
		st.repeated.upstream.Store(u)
	}
	return u.fields
}
