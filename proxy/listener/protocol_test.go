package listener

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// caller is a client that has said what it says, and is waiting for an answer or gone. What it said
// comes in pieces of the sizes in splits, as often as it takes.
type caller struct {
	net.Conn
	said   string
	splits []byte
	piece  int
	ended  bool // nothing follows; else a read would wait
	abrupt bool // the end comes with the last bytes, as a connection of crypto/tls may tell it
	read   int  // bytes
}

// errWaits stands for a read that would not come back.
var errWaits = errors.New("the client is waiting")

func (p *caller) Read(b []byte) (int, error) {
	left := p.said[p.read:]
	switch {
	case len(b) == 0:
		return 0, nil
	case left == "" && p.ended:
		return 0, io.EOF
	case left == "":
		return 0, errWaits
	}
	n := len(left)
	if len(p.splits) > 0 {
		n = min(n, 1+int(p.splits[p.piece%len(p.splits)]))
		p.piece++
	}
	n = copy(b, left[:n])
	p.read += n
	if p.abrupt && p.ended && p.read == len(p.said) {
		return n, io.EOF
	}
	return n, nil
}

func (*caller) SetReadDeadline(time.Time) error { return nil }

// spoken is what the first bytes of a client say, told without the code under test: HTTP/2 begins
// with three bytes that begin nothing else.
func spoken(said string) (http1, decided bool) {
	for i, c := range []byte{'P', 'R', 'I'} {
		switch {
		case i == len(said):
			return false, false
		case said[i] != c:
			return true, true
		}
	}
	return false, true
}

// FuzzSniff: whatever a client says, in whatever pieces it comes, nothing of it is lost, only what
// begins like HTTP/2 is taken for it, and nobody waits for more than it takes.
func FuzzSniff(f *testing.F) {
	f.Add("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", []byte{0}, true, false)
	f.Add("GET /health HTTP/1.1\r\n\r\n", []byte{}, false, false)
	f.Add("PR", []byte{0, 5}, false, false)
	f.Add("PRI", []byte{1, 0}, true, true)
	f.Add("PUT", []byte{9}, true, true)
	f.Add("", []byte{}, true, false)
	f.Fuzz(func(t *testing.T, said string, splits []byte, ended, abrupt bool) {
		http1, decided := spoken(said)
		client := &caller{said: said, splits: splits, ended: ended, abrupt: abrupt}
		conn, got, err := detectProtocol(context.Background(), client)
		if !decided {
			if want := errWaits; ended && !errors.Is(err, io.EOF) || !ended && !errors.Is(err, want) {
				t.Fatalf("%q, ended %t: %v", said, ended, err)
			}
			return
		}
		if err != nil || got != http1 {
			t.Fatalf("%q: HTTP/1 %t, %v", said, got, err)
		}
		if http1 && client.read > 3 || !http1 && client.read != 3 {
			t.Fatalf("%q: %d bytes were read to tell", said, client.read)
		}
		client.ended = true
		var all strings.Builder
		for b, n := make([]byte, 7), 0; err == nil; {
			n, err = conn.Read(b[:1+all.Len()%len(b)])
			all.Write(b[:n])
		}
		if !errors.Is(err, io.EOF) || all.String() != said {
			t.Fatalf("%q arrives as %q, %v", said, all.String(), err)
		}
	})
}

// scripted is a connection that reads what it is given.
type scripted struct {
	net.Conn
	r io.Reader
}

func (c scripted) Read(b []byte) (int, error) { return c.r.Read(b) }

func (scripted) SetReadDeadline(time.Time) error { return nil }

func sniffString(t testing.TB, said string, oneByOne bool) (http1 bool, all string, err error) {
	t.Helper()
	var r io.Reader = strings.NewReader(said)
	if oneByOne {
		r = iotest.OneByteReader(r)
	}
	conn, http1, err := detectProtocol(context.Background(), scripted{r: r})
	if err != nil {
		return false, "", err
	}
	rest, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return http1, string(rest), nil
}

func TestSniff(t *testing.T) {
	for said, want := range map[string]bool{
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00": false, "PRI": false, "GET / HTTP/1.1\r\n": true, "POST /v3/kv/put HTTP/1.1": true, "PROPFIND / HTTP/1.1": true, "P": true, "PRX": true, "\x16\x03\x01": true, "\x00": true,
	} {
		for _, oneByOne := range []bool{false, true} {
			http1, all, err := sniffString(t, said, oneByOne)
			switch {
			case said == "P":
				if !errors.Is(err, io.EOF) {
					t.Errorf("%q: %v", said, err)
				}
			case err != nil || http1 != want || all != said:
				t.Errorf("%q: HTTP/1 %t, %q, %v", said, http1, all, err)
			}
		}
	}
}
