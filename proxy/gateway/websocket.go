package gateway

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"google.golang.org/grpc/mem"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// websockets bridges websockets to the JSON gateway as etcd does: the messages of a client are the
// body of one POST, and each line of its response is a message. It is safe for concurrent use.
type websockets struct {
	api      http.Handler
	limit    int64 // of a message, and of a JSON value that is spread over several, in bytes
	budget   *bodyBudget
	upgrader websocket.Upgrader

	mu      sync.Mutex
	open    map[*socket]struct{}
	closing bool
	running sync.WaitGroup // of open, and of those that are closed
}

// socket is one websocket.
type socket struct {
	*websocket.Conn
	used bool // a message has arrived; under websockets.mu
}

// controlTimeout bounds how long a close frame may take.
const controlTimeout = time.Second

func newWebsockets(api http.Handler, budget *bodyBudget) *websockets {
	return &websockets{
		api: api, limit: budget.longest, budget: budget, open: make(map[*socket]struct{}),
		upgrader: websocket.Upgrader{
			HandshakeTimeout: listener.HandshakeTimeout, ReadBufferSize: 1 << 10, WriteBufferSize: 1 << 10,
			CheckOrigin: func(*http.Request) bool { return true }, // guardOrigin has checked it
		},
	}
}

// ServeHTTP implements http.Handler: what is no websocket goes to the gateway as it is.
func (ws *websockets) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !websocket.IsWebSocketUpgrade(r) {
		ws.api.ServeHTTP(w, r)
		return
	}
	var header http.Header
	protocols := r.Header.Get("Sec-WebSocket-Protocol")
	if strings.HasPrefix(protocols, "Bearer") {
		header = http.Header{"Sec-Websocket-Protocol": {"Bearer"}}
	}
	conn, err := ws.upgrader.Upgrade(w, r, header)
	if err != nil {
		return // Upgrade has responded
	}
	s := &socket{Conn: conn}
	if !ws.add(s) {
		s.end(websocket.CloseGoingAway)
		return
	}
	defer ws.remove(s)
	ws.bridge(s, r, protocols)
}

func (ws *websockets) add(s *socket) bool {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.closing {
		return false
	}
	ws.open[s] = struct{}{}
	ws.running.Add(1)
	return true
}

func (ws *websockets) remove(s *socket) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	delete(ws.open, s)
	ws.running.Done()
}

// Close ends the websockets that have sent nothing, waits for the others until ctx ends, and then
// ends them, too.
func (ws *websockets) Close(ctx context.Context) {
	ws.endAll(func(s *socket) bool { return !s.used })
	done := make(chan struct{})
	go func() {
		defer close(done)
		ws.running.Wait()
	}()
	select {
	case <-done:
	case <-ctx.Done():
		ws.endAll(func(*socket) bool { return true })
		<-done
	}
}

// endAll ends the websockets that match. New ones are refused from then on.
func (ws *websockets) endAll(match func(*socket) bool) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.closing = true
	for s := range ws.open {
		if match(s) {
			ws.running.Go(func() { s.end(websocket.CloseGoingAway) })
		}
	}
}

// end tells the client why, and closes the connection. It is safe for concurrent use.
func (s *socket) end(code int) {
	s.sendClose(code)
	_ = s.Close()
}

// sendClose sends a close frame, unless one was sent. It is safe for concurrent use.
func (s *socket) sendClose(code int) {
	// the client may have left
	_ = s.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, ""), time.Now().Add(controlTimeout))
}

// linger discards what the client still sends, for a moment: to close the connection meanwhile
// would have TCP drop the close frame.
func (s *socket) linger() {
	_ = s.NetConn().SetReadDeadline(time.Now().Add(controlTimeout)) // it may be closed
	_, _ = io.Copy(io.Discard, s.NetConn())
}

// bridge serves a websocket to its end.
func (ws *websockets) bridge(s *socket, r *http.Request, protocols string) {
	ctx, cancel := context.WithCancel(r.Context())
	body, bodyWriter := io.Pipe()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, r.URL.String(), body) //nolint:gosec // the gateway in this process serves it
	if err != nil {
		cancel()
		s.end(websocket.CloseInternalServerErr)
		return
	}
	for _, name := range []string{"Origin", "Referer"} {
		if v := r.Header.Get(name); v != "" {
			request.Header.Set(name, v)
		}
	}
	// Browsers cannot set other header fields of a websocket.
	if _, token, ok := strings.Cut(protocols, "Bearer,"); ok {
		request.Header.Set("Authorization", "Bearer "+strings.Trim(token, " "))
	} else if protocols != "" {
		request.Header.Set("Authorization", "")
	}
	if cookie, err := r.Cookie("token"); err == nil {
		request.Header.Set("Authorization", "Bearer "+cookie.Value)
	}
	var reading sync.WaitGroup
	reading.Go(func() {
		bodyWriter.CloseWithError(ws.read(ctx, s, bodyWriter))
		cancel()
		s.linger()
	})
	lines := &lineWriter{to: s, header: make(http.Header)}
	ws.api.ServeHTTP(lines, request)
	lines.flush()
	cancel()
	_ = body.Close() // it never fails
	s.sendClose(websocket.CloseNormalClosure)
	_ = s.SetReadDeadline(time.Now().Add(controlTimeout)) // for the client's own close frame
	reading.Wait()
	_ = s.Close()
}

// read writes what the client sends to bodyWriter, a line for each message. It returns io.EOF at
// the client's end.
func (ws *websockets) read(ctx context.Context, s *socket, bodyWriter *io.PipeWriter) error {
	s.SetReadLimit(ws.limit) // it tells the client
	var value jsonSize
	reserved := reservation{budget: ws.budget, expire: func() {
		_ = bodyWriter.CloseWithError(errBodyLate) // it never fails
		s.end(websocket.CloseTryAgainLater)
	}}
	defer reserved.release()
	for {
		_, r, err := s.NextReader()
		if err != nil {
			return io.EOF
		}
		message, err := mem.ReadAll(&budgetReader{
			Reader: r, ctx: ctx, free: freeBody, need: ws.limit, unfinished: value.n, reserved: &reserved,
		}, rpc.Buffers)
		if err != nil {
			message.Free()
			return io.EOF
		}
		if value.n == 0 && isBlank(message) {
			message.Free() // the decoder would keep it until the next value
			reserved.release()
			continue
		}
		ws.mu.Lock()
		s.used = true
		ws.mu.Unlock()
		err = ws.forward(s, message, &value, bodyWriter)
		message.Free()
		if err != nil {
			return io.EOF
		}
		if value.n == 0 {
			reserved.release() // the decoder asks for more only after it has decoded the value
		}
	}
}

// forward writes a message as a line of the body, unless the JSON value that it belongs to becomes
// too long.
func (ws *websockets) forward(s *socket, message mem.BufferSlice, value *jsonSize, bodyWriter *io.PipeWriter) error {
	for _, b := range message {
		if value.add(b.ReadOnlyData()); value.n > ws.limit {
			s.sendClose(websocket.CloseMessageTooBig)
			return websocket.ErrReadLimit
		}
	}
	for _, b := range message {
		if _, err := bodyWriter.Write(b.ReadOnlyData()); err != nil {
			return err
		}
	}
	newline := []byte("\n")
	value.add(newline)
	_, err := bodyWriter.Write(newline)
	return err
}

// isBlank reports whether a message has nothing but JSON's white space.
func isBlank(message mem.BufferSlice) bool {
	return !slices.ContainsFunc(message, func(b mem.Buffer) bool { return len(bytes.TrimLeft(b.ReadOnlyData(), " \t\r\n")) > 0 })
}

// jsonSize measures the JSON value that is not at its end: what decodes it keeps all of it.
type jsonSize struct {
	n       int64
	depth   int
	quoted  bool
	escaped bool
}

// add counts data, and starts again at the end of a value.
func (j *jsonSize) add(data []byte) {
	for _, c := range data {
		j.n++
		switch {
		case j.escaped:
			j.escaped = false
		case j.quoted:
			j.escaped, j.quoted = c == '\\', c != '"'
		case c == '"':
			j.quoted = true
		case c == '{' || c == '[':
			j.depth++
		case c == '}' || c == ']':
			j.depth--
		}
		// a number or a word ends with the character after it
		if j.depth <= 0 && !j.quoted && !j.escaped && strings.IndexByte(" \t\r\n,:}]\"", c) >= 0 {
			j.n, j.depth = 0, 0
		}
	}
}

// lineWriter is a response whose lines are messages. Its methods are called one at a time.
type lineWriter struct {
	to     *socket
	header http.Header
	line   []byte // as far as it was written
	err    error
}

// keptLine is how long a buffer may be that is kept for the next line, in bytes.
const keptLine = 64 << 10

// Header implements http.ResponseWriter.
func (w *lineWriter) Header() http.Header { return w.header }

// WriteHeader implements http.ResponseWriter; a websocket has no place for a status.
func (*lineWriter) WriteHeader(int) {}

// Flush implements http.Flusher; whole lines are sent at once.
func (*lineWriter) Flush() {}

// Write implements http.ResponseWriter.
func (w *lineWriter) Write(data []byte) (int, error) {
	for rest := data; len(rest) > 0 && w.err == nil; {
		part, after, whole := bytes.Cut(rest, []byte("\n"))
		w.line = append(w.line, part...)
		if rest = after; whole {
			w.flush()
		}
	}
	if w.err != nil {
		return 0, w.err
	}
	return len(data), nil
}

// flush sends what there is of a line.
func (w *lineWriter) flush() {
	line := bytes.TrimSuffix(w.line, []byte("\r"))
	if len(line) > 0 && w.err == nil {
		if w.err = w.to.WriteMessage(websocket.TextMessage, line); errors.Is(w.err, websocket.ErrCloseSent) {
			w.err = io.ErrClosedPipe
		}
	}
	if w.line = w.line[:0]; cap(w.line) > keptLine {
		w.line = nil
	}
}
