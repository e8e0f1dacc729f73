package relay

import "testing"

// TestFramesForWhoWaits: what comes for a direction that waits is held as bytes, and not frame by
// frame: a client may send empty ones without end.
func TestFramesForWhoWaits(t *testing.T) {
	st := new(clientStream)
	st.requests.detached.Store(true)
	for _, data := range []string{"", "a", "", "", "b", ""} {
		st.fromClient([]byte(data), false)
	}
	st.fromClient(nil, true)
	if b := st.requests.backlog; len(b) != 1 || string(b[0].data) != "ab" || !b[0].end {
		t.Errorf("%d pieces: %v", len(b), b)
	}
}
