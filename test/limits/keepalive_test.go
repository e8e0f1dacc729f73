package limits

import (
	"slices"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/net/http2"
)

// TestPings: who pings more often than etcd allows is sent away as etcd does it, with or without calls; who pings as often as etcd allows is not.
func TestPings(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0, nil)
	watch, err := encoded(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("/never")}}})
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for name, test := range map[string]struct {
		watches bool
		pause   time.Duration
		end     string
	}{
		"often, beside a watch":    {true, 100 * time.Millisecond, `GOAWAY ENHANCE_YOUR_CALM "too_many_pings"`},
		"often, without calls":     {false, 100 * time.Millisecond, `GOAWAY ENHANCE_YOUR_CALM "too_many_pings"`},
		"rightly, beside a watch":  {true, 5100 * time.Millisecond, "open"},
		"as often, without a call": {false, 4500 * time.Millisecond, `GOAWAY ENHANCE_YOUR_CALM "too_many_pings"`},
	} {
		if testing.Short() && test.pause > time.Second {
			continue
		}
		for side, address := range s.sides() {
			k := greet(t, address)
			if test.watches {
				_ = k.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: k.block(call("/etcdserverpb.Watch/Watch")...), EndHeaders: true})
				_ = k.WriteData(1, false, message(0, watch))
			}
			all.Go(func() {
				var heard []string
				for range 5 { // the first is free, the next three are too many if they are, and an answer to a call forgives one
					time.Sleep(test.pause)
					heard = last(k.settled())
					if !slices.Equal(heard, []string{"open"}) {
						break
					}
				}
				if heard[0] != test.end {
					t.Errorf("%s, %s: %q, want %q", side, name, heard, test.end)
				}
			})
		}
	}
	all.Wait()
}
