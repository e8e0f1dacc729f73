package limits

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/net/http2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// files raises the limit of this process, which the proxy gets as well, to what it may be, and
// returns it.
func files(t *testing.T) int {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Logf("the limit of files stays: %v", err)
	}
	return int(limit.Max)
}

// TestIdleConnections: thousands of clients that say no word, or no more than HTTP/2 asks for, cost
// the proxy some memory and nobody else anything.
func TestIdleConnections(t *testing.T) {
	n := 10_000
	if testing.Short() {
		n = 2000
	}
	n = min(n, files(t)-1000)
	s := newSite(t, 0, nil)
	for _, test := range []struct {
		name, says string
		kib        int64 // that one may cost
	}{
		{"silent", "", 24},
		{"HTTP/2", http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00", 96},
		{"HTTP/1", "GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 64},
	} {
		t.Run(test.name, func(t *testing.T) {
			s.abused(t, int64(n)*test.kib<<10+32<<20, func() {
				conns := make([]net.Conn, 0, n)
				defer func() {
					for _, c := range conns {
						// leaves no trace in the tables of the system
						_ = c.(*net.TCPConn).SetLinger(0)
						c.Close()
					}
				}()
				before := s.usage(t).goroutines
				for len(conns) < n {
					c, err := net.Dial("tcp", s.proxy.Address)
					if err != nil {
						t.Fatalf("connection %d: %v", len(conns), err)
					}
					conns = append(conns, c)
					if _, err := io.WriteString(c, test.says); err != nil {
						t.Fatalf("connection %d: %v", len(conns), err)
					}
				}
				harness.Eventually(t, 20*time.Second, "the proxy to have them all", func() error {
					if u := s.usage(t); u.goroutines < before+n {
						return fmt.Errorf("%v", u)
					}
					return s.proxy.Alive()
				})
				t.Logf("%d connections: %v", n, s.usage(t))
			})
		})
	}
}

// TestSlowClients: who takes for ever over a TLS handshake or over the first words of HTTP/2 is let
// go after ten seconds, and holds nobody up until then.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	var ca *harness.CA
	var clear, secure harness.Listener
	s := newSite(t, 0, func(s *site, cfg *harness.ProxyConfig) {
		ca = s.env.NewCA("clients")
		pair := ca.Server("proxy")
		clear, secure = harness.Listener{Address: harness.FreeAddress(t)}, harness.Listener{
			Address: harness.FreeAddress(t), TLS: &harness.ServerTLS{CertFile: pair.CertFile, KeyFile: pair.KeyFile, ClientCAFile: ca.File},
		}
		cfg.Listeners = []harness.Listener{clear, secure}
	})
	hello := clientHello(t)
	before := s.usage(t)
	done := s.honestClient(t)
	const n = 300
	drips := map[string]struct{ address, says string }{
		"TLS, nothing":              {secure.Address, ""},
		"TLS, one byte":             {secure.Address, "\x16"},
		"TLS, half a hello":         {secure.Address, hello[:len(hello)/2]},
		"TLS, hello, and no answer": {secure.Address, hello},
		"HTTP/2, half the preface":  {clear.Address, "PRI * HTTP/2"},
		"HTTP/2, no settings":       {clear.Address, http2.ClientPreface},
		"HTTP/2, half the settings": {clear.Address, http2.ClientPreface + "\x00\x00\x06\x04\x00"},
	}
	begun := time.Now()
	var all sync.WaitGroup
	for name, drip := range drips {
		for range n {
			all.Go(func() {
				conn, err := net.Dial("tcp", drip.address)
				if err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				defer conn.Close()
				if _, err := io.WriteString(conn, drip.says); err != nil {
					t.Errorf("%s: %v", name, err)
				}
				_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
				if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("%s: the proxy still waits after 20 s", name)
				} else if took := time.Since(begun); took < 5*time.Second {
					t.Errorf("%s: cut after %v, which is too soon for who is only slow", name, took)
				}
			})
		}
	}
	// Those who come meanwhile are served, over TLS too.
	config := ca.ClientTLS(ca.Client("client", "client"))
	kv := pb.NewKVClient(harness.Dial(t, secure.Address, config))
	for time.Since(begun) < 5*time.Second {
		if err := once(kv, "/over-tls", s.env.Sealed.Value("over TLS")); err != nil {
			t.Fatalf("over TLS: %v", err)
		}
		conn, err := tls.Dial("tcp", secure.Address, &tls.Config{RootCAs: config.RootCAs, Certificates: config.Certificates, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatalf("a new client: %v", err)
		}
		conn.Close()
	}
	all.Wait()
	done()
	s.settles(t, before)
}

// clientHello is what a client of TLS says first.
func clientHello(t *testing.T) string {
	t.Helper()
	near, far := net.Pipe()
	go func() {
		_ = tls.Client(near, &tls.Config{ServerName: "localhost", NextProtos: []string{"h2"}}).Handshake()
	}()
	buffer := make([]byte, 16<<10)
	n, err := far.Read(buffer)
	if err != nil || !bytes.HasPrefix(buffer, []byte("\x16")) {
		t.Fatalf("make a client hello: %v", err)
	}
	far.Close()
	return string(buffer[:n])
}

// TestHalfOpen: a client that says no more, and one that is gone without a word, take their calls
// with them, in etcd too.
func TestHalfOpen(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0, nil)
	before := s.usage(t)
	done := s.honestClient(t)
	watch, err := encoded(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("/never")}}})
	if err != nil {
		t.Fatal(err)
	}
	for name, leave := range map[string]func(*net.TCPConn){
		"no more to say": func(c *net.TCPConn) { _ = c.CloseWrite() },
		"reset":          func(c *net.TCPConn) { _ = c.SetLinger(0); c.Close() },
		"gone":           func(c *net.TCPConn) { c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			for side, address := range s.sides() {
				var all []*frameClient
				for range 20 {
					k := greet(t, address)
					block := k.block(call("/etcdserverpb.Watch/Watch")...)
					_ = k.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true})
					_ = k.WriteData(1, false, message(0, watch))
					all = append(all, k)
				}
				etcd := s.bare
				if side == "the proxy" {
					etcd = s.behind
				}
				watches := func(n int) {
					t.Helper()
					harness.Eventually(t, 20*time.Second, fmt.Sprintf("%d watches in etcd, by %s", n, side), func() error {
						if got := scrape(t, etcd.URL, "etcd_debugging_mvcc_watcher_total"); got != float64(n) {
							return fmt.Errorf("%v", got)
						}
						return nil
					})
				}
				watches(20)
				for _, k := range all {
					leave(k.Conn.(*net.TCPConn))
				}
				watches(0)
				if name == "no more to say" {
					if heard := last(all[0].listen(10 * time.Second)); strings.Join(heard, "") != "closed" {
						t.Errorf("%s: %q", side, heard)
					}
				}
			}
		})
	}
	done()
	s.settles(t, before)
}

// TestClientsThatDoNotRead: what nobody reads does not pile up in the proxy, and is dropped with
// its client.
func TestClientsThatDoNotRead(t *testing.T) {
	s := newSite(t, 0, nil)
	const values, size, clients = 32, 512 << 10, 8
	kv := pb.NewKVClient(harness.Dial(t, s.proxy.Address, nil))
	fill(t, kv, "/list/", values, []byte(s.env.Sealed.Value(strings.Repeat("v", size))))
	list, err := encoded(&pb.RangeRequest{Key: []byte("/list/"), RangeEnd: []byte("/list0")})
	if err != nil {
		t.Fatal(err)
	}
	watch, err := encoded(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("/list/"), RangeEnd: []byte("/list0"), StartRevision: 1}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, method string
		request      []byte
		mib          int64
	}{
		// Every client may hold one answer, as it came and as it goes, and the collector lets as
		// much again lie about.
		{"a list", "/etcdserverpb.KV/Range", list, clients * values * size * 5 >> 20},
		{"a list in a stream", "/etcdserverpb.KV/RangeStream", list, 128},
		{"a watch", "/etcdserverpb.Watch/Watch", watch, clients * values * size * 5 >> 20},
	} {
		t.Run(test.name, func(t *testing.T) {
			s.abused(t, test.mib<<20, func() {
				for range clients {
					k := greet(t, s.proxy.Address)
					block := k.block(call(test.method)...)
					_ = k.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true})
					_ = k.WriteData(1, test.method != "/etcdserverpb.Watch/Watch", message(0, test.request))
					defer k.Close()
					// They read no further than where the answer begins.
					_ = k.SetReadDeadline(time.Now().Add(20 * time.Second))
					if _, err := io.ReadFull(k.Conn, make([]byte, 1000)); err != nil {
						t.Fatal(err)
					}
				}
				// While they hang there is something new to tell, and somebody who reads.
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				conn := harness.Dial(t, s.proxy.Address, nil)
				defer conn.Close()
				w, err := pb.NewWatchClient(conn).Watch(ctx)
				if err != nil {
					t.Fatal(err)
				}
				if err := w.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("/list/new")}}}); err != nil {
					t.Fatal(err)
				}
				if _, err := w.Recv(); err != nil {
					t.Fatal(err)
				}
				for i := range 20 {
					value := s.env.Sealed.Value(fmt.Sprint("new ", i))
					if _, err := kv.Put(ctx, &pb.PutRequest{Key: []byte("/list/new"), Value: []byte(value)}); err != nil {
						t.Fatal(err)
					}
					if r, err := w.Recv(); err != nil || string(r.Events[0].Kv.Value) != value {
						t.Fatalf("a watch that is read: %d events, %v", len(r.GetEvents()), err)
					}
				}
				t.Logf("they hang: %v", s.usage(t))
			})
		})
	}
}
