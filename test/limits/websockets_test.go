package limits

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// TestLongWebsocketMessage: a message of 100 MiB over a websocket, in one frame or in many, is
// refused with the code for it, and none of it is kept.
func TestLongWebsocketMessage(t *testing.T) {
	for name, frame := range map[string]int{"one frame": 100 << 20, "many frames": 64 << 10} {
		t.Run(name, func(t *testing.T) {
			m := newMemorySite(t)
			send := func(total, frame int) *websocket.Conn {
				conn, _, err := websocket.DefaultDialer.DialContext(t.Context(), "ws://"+m.plain+"/v3/watch", nil)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { conn.Close() })
				piece := make([]byte, min(frame, 64<<10))
				for sent := 0; sent < total && err == nil; sent += len(piece) {
					if sent%frame == 0 {
						head := []byte{0, 0x80 | 127} // masked, with zeros
						if sent == 0 {
							head[0] = websocket.TextMessage
						}
						_, err = conn.NetConn().Write(append(binary.BigEndian.AppendUint64(head, uint64(frame)), 0, 0, 0, 0))
					}
					if err == nil {
						_, err = conn.NetConn().Write(piece) // it fails once the proxy has left
					}
				}
				return conn
			}
			defer m.honestClient(t)()
			m.grows(t, 16, func() { send(10, 10) }, func() {
				conn := send(100<<20, frame)
				if err := conn.SetReadDeadline(time.Now().Add(honestTimeout)); err != nil {
					t.Fatal(err)
				}
				_, _, err := conn.ReadMessage()
				t.Logf("it ends with %v", err)
				if e, ok := errors.AsType[*websocket.CloseError](err); ok && e.Code != websocket.CloseMessageTooBig || err == nil {
					t.Errorf("it is answered with %v", err)
				}
			})
		})
	}
}

// TestBlankWebsocketMessages: what is between two JSON values is not kept, in however many
// messages.
func TestBlankWebsocketMessages(t *testing.T) {
	for name, message := range map[string][]byte{"spaces": bytes.Repeat([]byte(" \r\n\t"), 256<<10), "empty": nil} {
		t.Run(name, func(t *testing.T) {
			m := newMemorySite(t)
			m.grows(t, 16, func() {}, func() {
				conn, _, err := websocket.DefaultDialer.DialContext(t.Context(), "ws://"+m.plain+"/v3/watch", nil)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				for range 100 {
					if err := conn.WriteMessage(websocket.TextMessage, message); err != nil {
						t.Fatal(err)
					}
				}
				if err := conn.WriteMessage(websocket.TextMessage, []byte(`{"create_request":{"key":"aw=="}}`)); err != nil {
					t.Fatal(err)
				}
				if err := conn.SetReadDeadline(time.Now().Add(honestTimeout)); err != nil {
					t.Fatal(err)
				}
				if _, payload, err := conn.ReadMessage(); err != nil || !bytes.Contains(payload, []byte(`"created":true`)) {
					t.Errorf("a watch behind them: %s, %v", payload, err)
				}
			})
		})
	}
}
