package limits

import (
	"slices"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/net/http2"
)

// TestPings: without TLS, a client that pings more often than etcd allows is sent away as by etcd,
// with or without calls. With TLS etcd does not limit pings, and nobody is sent away.
func TestPings(t *testing.T) {
	t.Parallel()
	watch, err := encoded(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("/never")}}})
	if err != nil {
		t.Fatal(err)
	}
	const kept, sentAway = "open", `GOAWAY ENHANCE_YOUR_CALM "too_many_pings"`
	var all sync.WaitGroup
	for _, w := range transports(t) {
		for _, test := range []struct {
			watches bool
			pause   time.Duration
			clear   string // how it ends without TLS
		}{
			{true, 100 * time.Millisecond, sentAway},
			{false, 100 * time.Millisecond, sentAway},
			{true, time.Second, sentAway},
			{false, time.Second, sentAway},
			{true, 5100 * time.Millisecond, kept},
			{false, 5100 * time.Millisecond, sentAway},
			{true, 10 * time.Second, kept},
			{false, 10 * time.Second, sentAway},
		} {
			if testing.Short() && test.pause > time.Second {
				continue
			}
			for side, address := range w.sides() {
				k := w.greet(t, address)
				if test.watches {
					_ = k.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: k.block(call("/etcdserverpb.Watch/Watch")...), EndHeaders: true})
					_ = k.WriteData(1, false, message(0, watch))
				}
				all.Go(func() {
					var heard []string
					// the first is free, the next three are too many if they are, and an answer to
					// a call forgives one
					for range 5 {
						time.Sleep(test.pause)
						heard = last(k.settled())
						if !slices.Equal(heard, []string{kept}) {
							break
						}
					}
					want := test.clear
					if w.tls != nil { // net/http does not limit pings
						want = kept
					}
					if heard[0] != want {
						t.Errorf("%s, %s, a ping every %v, a watch %t: %q, want %q", w.name, side, test.pause, test.watches, heard, want)
					}
				})
			}
		}
	}
	all.Wait()
}
