package limits

import (
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// TestLongWebsocketMessage: a message of 100 MiB over a websocket, in one frame or in many, is
// refused with the code for it, and none of it is kept.
func TestLongWebsocketMessage(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0, nil)
	defer s.witness(t)()
	const total = 100 << 20
	for name, frame := range map[string]int{"one frame": total, "many frames": 64 << 10} {
		conn, _, err := websocket.DefaultDialer.DialContext(t.Context(), "ws://"+s.proxy.Address+"/v3/watch", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		before := s.usage(t)
		piece := make([]byte, 64<<10)
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
		if err := conn.SetReadDeadline(time.Now().Add(witnessPatience)); err != nil {
			t.Fatal(err)
		}
		_, _, err = conn.ReadMessage()
		if e, ok := errors.AsType[*websocket.CloseError](err); ok && e.Code != websocket.CloseMessageTooBig {
			t.Errorf("%s: %v", name, err)
		} else if err == nil {
			t.Errorf("%s: it is answered", name)
		}
		after := s.usage(t)
		t.Logf("%s: %v, then %v; %v", name, before, after, err)
		if grown := after.peak - before.peak; grown > 16<<20 {
			t.Errorf("%s: memory has grown by %d MiB", name, grown>>20)
		}
	}
}
