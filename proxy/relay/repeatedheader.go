package relay

import (
	"slices"
	"sync/atomic"

	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
)

// maxRepeated is how many header lists of a client's connection are remembered.
const maxRepeated = 8

// maxTimedSize is the size of the header lists with a timeout that are remembered, as that of
// [http2conn.MaxHeaderListSize].
const maxTimedSize = 4 << 10

// repeatedHeader is a header list that a client sends repeatedly, with what was made of it.
type repeatedHeader struct {
	fields   []hpack.HeaderField
	head     requestHead
	method   *etcdapi.Method                       // nil if it is unknown
	upstream []atomic.Pointer[[]hpack.HeaderField] // for each endpoint, see [upstreamFields]
}

// repeatedHeaders are the last header lists that a client has repeated, and the last ones with a
// timeout. http2conn returns the same slice for a header block that it remembers, so lists are
// compared by their addresses. Lists with a timeout, which differs for each call, are compared
// without it. Only the goroutine that reads from the client uses it.
type repeatedHeaders struct {
	known, timed [maxRepeated]*repeatedHeader
	seenOnce     [maxRepeated]*hpack.HeaderField // the first fields of lists that came once
	nextKnown    uint8                           // of known
	nextTimed    uint8
	nextOnce     uint8
}

// requestHead reads the header list of a request. It returns what is known of the list, or nil when
// it comes for the first time.
func (s *session) requestHead(fields []hpack.HeaderField) (*repeatedHeader, requestHead) {
	if k := s.repeated(fields); k != nil {
		return k, k.head
	}
	i, size := len(fields)-1, uint32(0)
	for i >= 0 && fields[i].Name != timeoutName {
		i--
	}
	for _, f := range fields {
		size += f.Size()
	}
	if i < 0 || size > maxTimedSize || s.id.Denied {
		return nil, readRequestHead(fields)
	}
	k := s.repeatedTimed(fields[:i], fields[i+1:])
	h := k.head
	h.setTimeout(fields[i].Value)
	return k, h
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
	for i, seen := range r.seenOnce {
		if seen != first {
			continue
		}
		k := s.newRepeated(fields)
		r.seenOnce[i] = nil
		r.known[r.nextKnown] = k
		r.nextKnown = (r.nextKnown + 1) % maxRepeated
		return k
	}
	r.seenOnce[r.nextOnce] = first
	r.nextOnce = (r.nextOnce + 1) % maxRepeated
	return nil
}

// repeatedTimed returns what is known of a header list that has a timeout between two parts.
func (s *session) repeatedTimed(before, after []hpack.HeaderField) *repeatedHeader {
	r := &s.headers
	for _, k := range r.timed {
		if k != nil && len(k.fields) == len(before)+len(after) &&
			slices.Equal(k.fields[:len(before)], before) && slices.Equal(k.fields[len(before):], after) {
			return k
		}
	}
	k := s.newRepeated(slices.Concat(before, after))
	r.timed[r.nextTimed] = k
	r.nextTimed = (r.nextTimed + 1) % maxRepeated
	return k
}

func (s *session) newRepeated(fields []hpack.HeaderField) *repeatedHeader {
	k := &repeatedHeader{fields: fields, head: readRequestHead(fields), upstream: make([]atomic.Pointer[[]hpack.HeaderField], len(s.endpoints))}
	k.method = s.engine.api.Method(k.head.path)
	return k
}

// fieldsOf returns the header fields of a call for the endpoint, without its timeout.
func (h *endpointState) fieldsOf(st *clientStream) []hpack.HeaderField {
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
