package limits

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// floodTime bounds one flood: a server that does not read any more stops its client.
const floodTime = 2 * time.Second

// flood says something over and over, until the server closes, the time is over, or n times. What
// the server answers is read only if reads.
func (k *frameClient) flood(n int, reads bool, say func(i int)) (heard []string) {
	_ = k.SetWriteDeadline(time.Now().Add(floodTime))
	listening := make(chan []string, 1)
	if reads {
		go func() { listening <- k.listen(floodTime + time.Second) }()
	}
	for i := range n {
		say(i)
		if i%1000 == 999 {
			// A write to a connection that the other side has closed, or does not read from, fails.
			if _, err := k.Write(nil); err != nil || k.broken() {
				break
			}
		}
	}
	if reads {
		_ = k.SetWriteDeadline(time.Now().Add(floodTime))
		_ = k.WritePing(false, [8]byte([]byte(mark)))
		heard = <-listening
	}
	_ = k.Close()
	return heard
}

// broken reports whether a frame can no longer be sent.
func (k *frameClient) broken() bool { return k.WriteWindowUpdate(0, 1) != nil }

// last is how a conversation ended: the last GOAWAY, and whether the connection is open. What comes
// before depends on who is faster.
func last(heard []string) []string {
	var end []string
	for _, h := range heard {
		if strings.HasPrefix(h, "GOAWAY") || h == "open" || h == "closed" {
			end = append(end, h)
		}
	}
	return end
}

// TestFloods: frames without end, each of them allowed. The proxy lets go of a client where etcd
// does, takes no more memory than it may, and serves others all the while.
func TestFloods(t *testing.T) {
	s := newSite(t, 0, nil)
	n, calls, connections := 100_000, 10_000, 4
	if testing.Short() {
		n, calls, connections = 30_000, 5000, 2
	}
	rangeMethod := call("/etcdserverpb.KV/Range")
	big := strings.Repeat("b", 4000)
	for _, test := range []struct {
		name  string
		reads bool
		flood func(k *frameClient) func(i int)
		mib   int64  // what the proxy may take
		told  string // the GOAWAY frame that only the proxy sends
	}{
		{"SETTINGS", false, func(k *frameClient) func(int) { return func(int) { _ = k.WriteSettings() } }, 64, ""},
		{"PING", true, func(k *frameClient) func(int) { return func(int) { _ = k.WritePing(false, [8]byte{}) } }, 64, ""},
		{"PING that nobody reads the answers to", false, func(k *frameClient) func(int) { return func(int) { _ = k.WritePing(false, [8]byte{}) } }, 64, ""},
		{"PRIORITY", true, func(k *frameClient) func(int) {
			return func(int) { _ = k.WritePriority(1, http2.PriorityParam{StreamDep: 3, Weight: 1}) }
		}, 64, ""},
		{"WINDOW_UPDATE", true, func(k *frameClient) func(int) {
			for i := range uint32(1000) {
				k.begin(2*i+1, nil, rangeMethod...)
			}
			return func(i int) { _ = k.WriteWindowUpdate(uint32(1+2*(i%1000)), 1) }
		}, 64, ""},
		{"WINDOW_UPDATE of streams that nobody has opened", true, func(k *frameClient) func(int) {
			return func(i int) { _ = k.WriteWindowUpdate(uint32(1+2*(i%1000)), 1) }
		}, 64, "GOAWAY PROTOCOL_ERROR"},
		{"RST_STREAM of calls that have begun", true, func(k *frameClient) func(int) {
			return func(i int) {
				k.begin(uint32(2*i+1), nil, rangeMethod...)
				_ = k.WriteRSTStream(uint32(2*i+1), http2.ErrCodeCancel)
			}
		}, 256, ""},
		{"RST_STREAM of calls that etcd works on", true, func(k *frameClient) func(int) {
			return func(i int) {
				k.begin(uint32(2*i+1), message(0, []byte("\x0a\x01k")), rangeMethod...)
				_ = k.WriteRSTStream(uint32(2*i+1), http2.ErrCodeCancel)
			}
		}, 256, ""},
		{"RST_STREAM of watches", true, func(k *frameClient) func(int) {
			return func(i int) {
				k.begin(uint32(2*i+1), nil, call("/etcdserverpb.Watch/Watch")...)
				_ = k.WriteRSTStream(uint32(2*i+1), http2.ErrCodeCancel)
			}
		}, 256, ""},
		{"empty DATA", true, func(k *frameClient) func(int) {
			k.begin(1, nil, rangeMethod...)
			return func(int) { _ = k.WriteData(1, false, nil) }
		}, 64, ""},
		{"padding", true, func(k *frameClient) func(int) {
			k.begin(1, nil, rangeMethod...)
			return func(int) { _ = k.WriteDataPadded(1, false, nil, make([]byte, 255)) }
		}, 64, ""},
		{"CONTINUATION", true, func(k *frameClient) func(int) {
			_ = k.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: k.block(rangeMethod...)})
			return func(int) { _ = k.WriteContinuation(1, false, k.block("x", big)) }
		}, 256, "GOAWAY PROTOCOL_ERROR"},
		{"empty CONTINUATION", true, func(k *frameClient) func(int) {
			_ = k.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: k.block(rangeMethod...)})
			return func(int) { _ = k.WriteContinuation(1, false, nil) }
		}, 64, "GOAWAY PROTOCOL_ERROR"},
		{"headers that are small packed", true, func(k *frameClient) func(int) {
			// One entry of the table, and then a byte each for all its copies.
			bomb := append(k.block(append(call("/etcdserverpb.KV/Range"), "x-bomb", big)...), []byte(strings.Repeat("\xbe", 12_000))...)
			return func(i int) {
				if i < 100 {
					_ = k.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: bomb, EndHeaders: true, EndStream: true})
				}
			}
		}, 512, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			ends := make(map[string][]string)
			if test.reads {
				for side, address := range s.sides() {
					k := greet(t, address)
					// Whether a connection is closed on which frames go on to come for a stream
					// that has ended is chance: grpc-go's server does one or the other, in etcd
					// too.
					ends[side] = slices.DeleteFunc(last(k.flood(5000, true, test.flood(k))), func(s string) bool { return !strings.HasPrefix(s, "GOAWAY") })
				}
				t.Logf("it ends with %q", ends["the proxy"])
				want, got := ends["bare etcd"], ends["the proxy"]
				if test.told != "" && len(got) > 0 { // the text is for people
					got[0], _, _ = strings.Cut(got[0], ` "`)
					want = append(want, test.told)
				}
				if !slices.Equal(want, got) {
					t.Errorf("\nbare etcd: %q\nthe proxy: %q", want, got)
				}
			}
			s.abused(t, test.mib<<20, func() {
				var all sync.WaitGroup
				times := n
				if strings.HasPrefix(test.name, "RST") {
					times = calls // each is work for etcd
				}
				for range connections {
					k := greet(t, s.proxy.Address)
					all.Go(func() { k.flood(times, test.reads, test.flood(k)) })
				}
				all.Wait()
			})
		})
	}
}
