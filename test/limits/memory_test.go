package limits

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/net/http2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// memorySite is a proxy whose memory is measured: one listener without TLS for everyone, and one
// with TLS that only allows the client "allowed".
type memorySite struct {
	*site
	plain, secure   string // addresses
	allowed, denied *tls.Config
}

func newMemorySite(t *testing.T) *memorySite {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("reads /proc")
	}
	t.Setenv("GOGC", "") // as in production, whatever the other tests use
	m := &memorySite{plain: harness.FreeAddress(t), secure: harness.FreeAddress(t)}
	files(t)
	m.site = &site{env: harness.New(t)}
	ca := m.env.NewCA("clients")
	pair := ca.Server("proxy")
	m.behind = m.env.StartEtcd(harness.EtcdConfig{Name: "behind", MaxRequestBytes: 3 << 20, Flags: []string{"--unsafe-no-fsync"}})
	cfg := m.config(m.behind.URL)
	cfg.Etcd.MaxRequestBytes = 2 << 20
	cfg.Listeners = []harness.Listener{{Address: m.plain}, {
		Address: m.secure, AllowedClients: []string{"allowed"},
		TLS: &harness.ServerTLS{CertFile: pair.CertFile, KeyFile: pair.KeyFile, ClientCAFile: ca.File},
	}}
	m.proxy = m.env.StartProxy("proxy", cfg)
	m.proxy.WaitReady(30 * time.Second)
	for name, config := range map[string]**tls.Config{"allowed": &m.allowed, "denied": &m.denied} {
		*config = ca.ClientTLS(ca.Client(name, name))
		(*config).NextProtos = []string{"h2"}
		// So that the memory of handshakes is not what is measured where connections are few.
		(*config).ClientSessionCache = tls.NewLRUClientSessionCache(1)
	}
	return m
}

// greetTLS is greet over TLS.
func (m *memorySite) greetTLS(t *testing.T, config *tls.Config) *frameClient {
	t.Helper()
	conn, err := tls.Dial("tcp", m.secure, config)
	if err != nil {
		t.Fatal(err)
	}
	k := newFrameClient(conn)
	k.raw(http2.ClientPreface)
	_ = k.WriteSettings()
	return k
}

// greetAs is greet by the client of the name: one that is allowed comes without TLS.
func (m *memorySite) greetAs(t *testing.T, name string) *frameClient {
	t.Helper()
	if name == "allowed" {
		return greet(t, m.plain)
	}
	return m.greetTLS(t, m.denied)
}

// resident is what /proc says about the memory of the proxy, in bytes.
type resident struct{ peak, rss, file int64 }

func (m *memorySite) resident(t *testing.T) (r resident) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.proxy.PID()))
	if err != nil {
		t.Fatal(err)
	}
	fields := map[string]*int64{"VmHWM:": &r.peak, "VmRSS:": &r.rss, "RssFile:": &r.file}
	for line := range strings.Lines(string(status)) {
		words := strings.Fields(line)
		if to := fields[words[0]]; to != nil {
			kib, err := strconv.ParseInt(words[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			*to = kib << 10
		}
	}
	return r
}

// grows runs abuse and fails if the peak of the proxy's memory grows by more than limit. Before, it
// runs warm, so that code, pools and connections to etcd that any client needs are there. Pages of
// the binary that are first used meanwhile do not count.
func (m *memorySite) grows(t *testing.T, mib int64, warm, abuse func()) {
	t.Helper()
	kv := pb.NewKVClient(harness.Dial(t, m.plain, nil))
	value := m.env.Sealed.Value("witness")
	for range 300 {
		if err := once(kv, "/warm", value); err != nil {
			t.Fatal(err)
		}
	}
	warm()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", m.proxy.PID()), []byte("5"), 0); err != nil {
		t.Fatalf("reset the peak of the memory: %v", err)
	}
	before := m.resident(t)
	abuse()
	after := m.resident(t)
	grown := after.peak - before.rss - max(0, after.file-before.file)
	t.Logf("memory grew by %.1f MiB (limit %d), from %d MiB to %d MiB", float64(grown)/(1<<20), mib, before.rss>>20, after.peak>>20)
	if grown > mib<<20 {
		t.Errorf("memory grew by %.1f MiB, limit %d MiB", float64(grown)/(1<<20), mib)
	}
	if err := m.proxy.Alive(); err != nil {
		t.Error(err)
	}
	if err := once(kv, "/after", value); err != nil {
		t.Errorf("an honest client afterwards: %v", err)
	}
}

// answered waits until the server has answered a PING, or closed the connection.
func (k *frameClient) answered() []string {
	_ = k.WritePing(false, [8]byte([]byte(mark)))
	return k.listen(20 * time.Second)
}

// status waits for the status of a call, and returns whether it is the one given.
func (k *frameClient) status(code string) bool {
	answered := func() bool { return len(k.heard) > 0 && strings.Contains(k.heard[len(k.heard)-1], "grpc-status: ") }
	heard := k.listenUntil(20*time.Second, answered)
	return strings.Contains(strings.Join(heard, "\n"), "grpc-status: "+code)
}

const rangeMethod = "/etcdserverpb.KV/Range"

// tinyFields starts a stream with n header fields of 33 bytes each (RFC 9113, section 6.5.2), of
// one byte each on the wire.
func (k *frameClient) tinyFields(stream uint32, n int) {
	block := append(k.block(call(rangeMethod, "a", "")...), slices.Repeat([]byte{0xbe}, n)...)
	const frame = 16 << 10
	_ = k.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block[:min(frame, len(block))], EndHeaders: len(block) <= frame})
	for block = block[min(frame, len(block)):]; len(block) > 0; block = block[min(frame, len(block)):] {
		_ = k.WriteContinuation(stream, len(block) <= frame, block[:min(frame, len(block))])
	}
}

// TestMemoryOfHeaderFields: streams with 400,000 header fields each. A client that is refused by
// closing the connection comes back with the next stream.
func TestMemoryOfHeaderFields(t *testing.T) {
	for name, mib := range map[string]int64{"allowed": 24, "not allowed": 8} {
		t.Run(name, func(t *testing.T) {
			m := newMemorySite(t)
			streams := func(n, fields int) {
				var all sync.WaitGroup
				defer all.Wait()
				for i := 0; i < n; {
					k := m.greetAs(t, name)
					_ = k.SetWriteDeadline(time.Now().Add(10 * time.Second))
					for stream := uint32(1); i < n && !k.broken(); stream += 2 {
						k.tinyFields(stream, fields)
						i++
					}
					all.Go(func() { k.answered(); k.Close() })
				}
			}
			m.grows(t, mib, func() { streams(40, 10) }, func() { streams(40, 400_000) })
		})
	}
}

// TestMemoryOfHTTPHeaders: 40 connections over HTTP/1 with a header of 1 MB that does not end.
func TestMemoryOfHTTPHeaders(t *testing.T) {
	for name, mib := range map[string]int64{"allowed": 24, "not allowed": 8} {
		t.Run(name, func(t *testing.T) {
			m := newMemorySite(t)
			m.allowed.NextProtos, m.denied.NextProtos = []string{"http/1.1"}, []string{"http/1.1"}
			config := m.allowed
			if name != "allowed" {
				config = m.denied
			}
			send := func(n, size int) {
				header := "GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + strings.Repeat("x", size)
				var all sync.WaitGroup
				for range n {
					conn, err := tls.Dial("tcp", m.secure, config)
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { conn.Close() })
					all.Go(func() {
						_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
						_, _ = io.WriteString(conn, header)
						_, _ = conn.Read(make([]byte, 1)) // what the proxy has to say, if anything
					})
				}
				all.Wait()
			}
			m.grows(t, mib, func() { send(40, 10) }, func() { send(40, 1_000_000) })
		})
	}
}

// TestMemoryOfUnfinishedMessages: 100 streams on one connection, each with 1.9 MB of a message of
// 1.9 MB and a bit. The client respects the flow-control windows.
func TestMemoryOfUnfinishedMessages(t *testing.T) {
	for name, mib := range map[string]int64{"allowed": 260, "not allowed": 8} {
		t.Run(name, func(t *testing.T) {
			m := newMemorySite(t)
			m.grows(t, mib, func() {}, func() {
				k := m.greetAs(t, name)
				defer k.Close()
				sent := k.unfinished(t, 100, unfinishedMessage(1_900_000), 3*time.Second)
				t.Logf("the proxy took %d MiB", sent>>20)
			})
		})
	}
	// The JSON gateway takes longer bodies, and decodes them in buffers that double.
	for name, mib := range map[string]int64{"allowed, JSON": 260, "not allowed, JSON": 8} {
		t.Run(name, func(t *testing.T) {
			m := newMemorySite(t)
			m.grows(t, mib, func() {}, func() {
				config := m.allowed
				if name != "allowed, JSON" {
					config = m.denied
				}
				k := m.greetTLS(t, config)
				defer k.Close()
				sent := k.unfinished(t, 100, unfinishedJSON(3_800_000), 3*time.Second)
				t.Logf("the proxy took %d MiB", sent>>20)
			})
		})
	}
}

// unfinishedRequest is a request without the end of its body.
type unfinishedRequest struct {
	header []string
	front  []byte // of the body
	size   int    // of the body, filled up with 'A'
}

// unfinishedMessage is all but the last byte of a gRPC message of size bytes.
func unfinishedMessage(size int) unfinishedRequest {
	return unfinishedRequest{call("/etcdserverpb.KV/Put"), binary.BigEndian.AppendUint32([]byte{0}, uint32(size)), headLength + size - 1}
}

// unfinishedJSON is a Put of the JSON gateway that lacks the end of its value.
func unfinishedJSON(size int) unfinishedRequest {
	header := []string{":method", "POST", ":scheme", "https", ":path", "/v3/kv/put", ":authority", "localhost", "content-type", "application/json"}
	return unfinishedRequest{header, []byte(`{"key":"L3dpdG5lc3M=","value":"`), size}
}

// unfinished sends a request n times, as far as the windows allow, until nothing has moved for the
// time given. It returns how many bytes were sent.
func (k *frameClient) unfinished(t *testing.T, n int, request unfinishedRequest, quiet time.Duration) (sent int) {
	t.Helper()
	var mu sync.Mutex
	conn, initial := 65535, 65535
	windows, left := make([]int, n), make([]int, n)
	wake, closed := make(chan struct{}, 1), make(chan struct{})
	for i := range n {
		windows[i], left[i] = initial, request.size
	}
	go func() {
		defer close(closed)
		for {
			f, err := k.ReadFrame()
			if err != nil {
				return
			}
			mu.Lock()
			switch f := f.(type) {
			case *http2.SettingsFrame:
				if v, ok := f.Value(http2.SettingInitialWindowSize); ok {
					for i := range windows {
						windows[i] += int(v) - initial
					}
					initial = int(v)
				}
			case *http2.WindowUpdateFrame:
				if f.StreamID == 0 {
					conn += int(f.Increment)
				} else {
					windows[f.StreamID/2] += int(f.Increment)
				}
			case *http2.RSTStreamFrame:
				left[f.StreamID/2] = 0
			case *http2.MetaHeadersFrame:
				if f.StreamEnded() {
					left[f.StreamID/2] = 0
				}
			}
			mu.Unlock()
			select {
			case wake <- struct{}{}:
			default:
			}
		}
	}()
	for i := range n {
		k.begin(uint32(2*i+1), nil, request.header...)
	}
	payload := bytes.Repeat([]byte("A"), 16<<10)
	idle := time.NewTimer(quiet)
	for {
		moved := false
		for i := range n {
			mu.Lock()
			part := min(conn, windows[i], left[i], len(payload))
			if part > 0 {
				conn, windows[i] = conn-part, windows[i]-part
				left[i] -= part
			}
			first := left[i]+part == request.size
			mu.Unlock()
			if part <= 0 {
				continue
			}
			data := payload[:part]
			if first {
				data = append(slices.Clone(request.front), payload[:part-len(request.front)]...)
			}
			if k.WriteData(uint32(2*i+1), false, data) != nil {
				return sent
			}
			sent += part
			moved = true
		}
		if moved {
			idle.Reset(quiet)
			continue
		}
		select {
		case <-wake:
		case <-closed:
			return sent
		case <-idle.C:
			return sent
		}
	}
}

// headLength is the length of the prefix of a gRPC message.
const headLength = 5

// TestMemoryOfConnections: connections that come and go, or stay.
func TestMemoryOfConnections(t *testing.T) {
	t.Run("short, with an unknown method", func(t *testing.T) {
		m := newMemorySite(t)
		short := func(n int) {
			var all sync.WaitGroup
			for range 8 {
				all.Go(func() {
					for range n / 8 {
						k := greet(t, m.plain)
						k.begin(1, []byte{}, call("/etcdserverpb.KV/Unknown")...)
						if !k.status("12") {
							t.Errorf("heard %q", k.heard)
						}
						// leaves no trace in the tables of the system
						_ = k.Conn.(*net.TCPConn).SetLinger(0)
						k.Close()
					}
				})
			}
			all.Wait()
		}
		m.grows(t, 24, func() { short(80) }, func() { short(5000) })
	})
	// Each connection is a full handshake or a resumed one, and both leave garbage.
	for name, resumed := range map[string]bool{"not allowed": false, "not allowed, with a resumed session": true} {
		t.Run(name, func(t *testing.T) {
			m := newMemorySite(t)
			if !resumed {
				m.denied.ClientSessionCache = nil
			}
			refused := func(n int) {
				var all sync.WaitGroup
				for range 8 {
					all.Go(func() {
						for range n / 8 {
							k := m.greetTLS(t, m.denied)
							t.Cleanup(func() { k.Close() })
							k.begin(1, nil, call(rangeMethod)...)
							if !k.status("7") {
								t.Errorf("heard %q", k.heard)
							}
						}
					})
				}
				all.Wait()
			}
			m.grows(t, 16, func() { refused(80) }, func() { refused(1000) })
		})
	}
	// Neither a connection over which requests of HTTP/1 are refused costs more, nor one over which
	// nothing is requested.
	for name, try := range map[string]struct{ protocol, says, hears string }{
		"not allowed, HTTP/1":           {"http/1.1", "POST /v3/kv/range HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}", "HTTP/1.1 403 Forbidden\r\n"},
		"not allowed, HTTP/1, silent":   {"http/1.1", "", ""},
		"not allowed, HTTP/2, silent":   {"h2", "", ""},
		"not allowed, HTTP/2, settings": {"h2", http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00", "\x00\x00\x0c\x04"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMemorySite(t)
			m.denied.ClientSessionCache, m.denied.NextProtos = nil, []string{try.protocol}
			connected := func(n int) {
				var all sync.WaitGroup
				for range 8 {
					all.Go(func() {
						for range n / 8 {
							conn, err := tls.Dial("tcp", m.secure, m.denied)
							if err != nil {
								t.Error(err)
								return
							}
							t.Cleanup(func() { conn.Close() })
							_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
							heard := make([]byte, len(try.hears))
							_, err = io.WriteString(conn, try.says)
							if err == nil {
								_, err = io.ReadFull(conn, heard)
							}
							if err != nil || string(heard) != try.hears {
								t.Errorf("heard %q, %v", heard, err)
							}
						}
					})
				}
				all.Wait()
			}
			m.grows(t, 16, func() { connected(80) }, func() { connected(1000) })
		})
	}
	t.Run("idle", func(t *testing.T) {
		m := newMemorySite(t)
		idle := func(n int) {
			for range n {
				k := greet(t, m.plain)
				_ = k.WriteSettingsAck()
				k.answered()
			}
		}
		m.grows(t, 16, func() { idle(20) }, func() { idle(1000) })
	})
}

// TestMemoryOfStreams: calls that have begun on one connection, and sent nothing.
func TestMemoryOfStreams(t *testing.T) {
	for name, method := range map[string]string{"of one request": rangeMethod, "of many requests": "/etcdserverpb.Watch/Watch"} {
		t.Run(name, func(t *testing.T) {
			m := newMemorySite(t)
			open := func(n int) {
				k := greet(t, m.plain)
				defer k.Close()
				w := bufio.NewWriterSize(k.Conn, 64<<10)
				f := http2.NewFramer(w, nil)
				block := k.block(call(method)...)
				for i := range n {
					if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: block, EndHeaders: true}); err != nil {
						t.Fatal(err)
					}
					block = k.block(call(method)...)
				}
				w.Flush()
				if heard := k.answered(); !slices.Equal(heard, []string{"open"}) {
					t.Errorf("heard %q", heard[:min(10, len(heard))])
				}
			}
			m.grows(t, 64, func() { open(20) }, func() { open(20_000) })
		})
	}
}

// TestMemoryOfUnfinishedBodies: 200 connections send all but the end of a JSON request of 3.9 MB,
// over HTTP/1, as a websocket message or over HTTP/2. Small requests beside them are served, and
// once the clients have left, so is a long one.
func TestMemoryOfUnfinishedBodies(t *testing.T) {
	request := unfinishedJSON(3_900_000)
	body := slices.Concat(request.front, bytes.Repeat([]byte("A"), request.size-len(request.front)))
	put := func(t *testing.T, m *memorySite, size int) {
		t.Helper()
		if answer := m.put(t, size); answer != "HTTP/1.1 200 OK" {
			t.Errorf("a request of %d bytes: %q", size, answer)
		}
	}
	const short, long = len(`{"key":"L3dpdG5lc3M=","value":"AAAA"}`), 1_000_000
	post := "POST /v3/kv/put HTTP/1.1\r\nHost: localhost\r\n"
	length := binary.BigEndian.AppendUint64(nil, uint64(len(body)+2))
	for name, head := range map[string]string{
		"with a length":     fmt.Sprintf("%sContent-Length: %d\r\n\r\n", post, len(body)+2),
		"of unknown length": fmt.Sprintf("%sTransfer-Encoding: chunked\r\n\r\n%x\r\n", post, len(body)+2),
		"websocket":         "\x81\xff" + string(length) + "\x00\x00\x00\x00", // masked, with zeros
	} {
		t.Run(name, func(t *testing.T) {
			m := newMemorySite(t)
			small := func() { put(t, m, short) }
			m.grows(t, 260, small, func() {
				m.callsBesideSenders(t, func() *frameClient {
					if name != "websocket" {
						return connect(t, m.plain)
					}
					conn, _, err := websocket.DefaultDialer.DialContext(t.Context(), "ws://"+m.plain+"/v3/kv/put", nil)
					if err != nil {
						t.Fatal(err)
					}
					return newFrameClient(conn.NetConn())
				}, append([]byte(head), body...), small)
			})
			put(t, m, long)
		})
	}
	for name, length := range map[string]int{"HTTP/2, with a length": request.size + 2, "HTTP/2, of unknown length": 0} {
		t.Run(name, func(t *testing.T) {
			m := newMemorySite(t)
			if length > 0 {
				request.header = append(slices.Clip(request.header), "content-length", strconv.Itoa(length))
			}
			m.grows(t, 320, func() { put(t, m, short) }, func() {
				var senders sync.WaitGroup
				for range 200 {
					k := m.greetTLS(t, m.allowed)
					defer k.Close()
					senders.Go(func() { k.unfinished(t, 1, request, 3*time.Second) })
				}
				put(t, m, short)
				senders.Wait()
			})
			put(t, m, long)
		})
	}
}

// put sends a Put of the JSON gateway of size bytes over HTTP/1, with Expect: 100-continue, and
// returns the status line of the final response.
func (m *memorySite) put(t *testing.T, size int) string {
	t.Helper()
	const front, end = `{"key":"L3dpdG5lc3M=","value":"`, `"}`
	conn := connect(t, m.plain)
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = fmt.Fprintf(conn.Conn, "POST /v3/kv/put HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n", size)
	lines := bufio.NewReader(conn.Conn)
	line, _ := lines.ReadString('\n')
	if line != "HTTP/1.1 100 Continue\r\n" {
		return strings.TrimSpace(line)
	}
	_, _ = lines.ReadString('\n')
	_, _ = io.WriteString(conn.Conn, front+strings.Repeat("A", (size-len(front+end))/4*4)+end+strings.Repeat(" ", (size-len(front+end))%4))
	line, _ = lines.ReadString('\n')
	return strings.TrimSpace(line)
}
