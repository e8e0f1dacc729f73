package etcdwire

import "google.golang.org/protobuf/encoding/protowire"

// Fields of WatchRequest, WatchCreateRequest and WatchResponse.
const (
	watchCreate         = 1
	watchCreateFragment = 8
	watchID             = 2
	watchCreated        = 3
	watchCanceled       = 4
	watchFragment       = 7
	watchEvents         = 11
)

// Watched is what a WatchResponse says of its watch.
type Watched struct {
	ID                int64
	Created, Canceled bool
}

// WatchedBy returns what a WatchResponse says of its watch.
func WatchedBy(msg []byte) (w Watched, err error) {
	s := scan(&watchResponse, msg, 0, len(msg))
	for s.next() {
		switch s.field.num {
		case watchID:
			w.ID = int64(s.field.n) //nolint:gosec // int64 on the wire
		case watchCreated:
			w.Created = s.field.n != 0
		case watchCanceled:
			w.Canceled = s.field.n != 0
		}
	}
	return w, s.err
}

// Fragments cuts a WatchResponse of limit bytes or more into several below it, as etcd's server
// does: each has all that is not an event, and says that more follow, but for the last one, which
// says what the whole did. An event is never cut, so a fragment of one event may be longer. It
// returns nil for a message that is to stay as it is; the fragments are bytes of their own.
func Fragments(msg []byte, limit int) ([][]byte, error) {
	if len(msg) < limit {
		return nil, nil
	}
	var common []byte // all but events and the mark
	var events []field
	more := false
	s := scan(&watchResponse, msg, 0, len(msg))
	for s.next() {
		switch s.field.num {
		case watchEvents:
			events = append(events, s.field)
		case watchFragment:
			more = s.field.n != 0
		default:
			common = append(common, msg[s.field.start:s.field.end]...)
		}
	}
	if s.err != nil || len(events) < 2 {
		return nil, s.err
	}
	const mark = 2 // bytes
	var all [][]byte
	for len(events) > 0 {
		size, n := len(common)+mark, 0
		for n < len(events) && (n == 0 || size+events[n].end-events[n].start < limit) {
			size += events[n].end - events[n].start
			n++
		}
		one := append(make([]byte, 0, size), common...)
		if n < len(events) || more {
			one = protowire.AppendVarint(protowire.AppendTag(one, watchFragment, protowire.VarintType), 1)
		}
		for _, e := range events[:n] {
			one = append(one, msg[e.start:e.end]...)
		}
		all, events = append(all, one), events[n:]
	}
	return all, nil
}
