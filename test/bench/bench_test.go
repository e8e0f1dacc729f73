package main

import (
	"bytes"
	"encoding/json"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	relayIfAsked() // the run under test starts this binary as its relay
	os.Exit(m.Run())
}

// TestShort is `go run . -short` with its figures looked at: every row has been measured on every subject, and nothing is zero, negative or
// absurd.
func TestShort(t *testing.T) {
	cfg, _, err := parse([]string{"-short"})
	if err != nil {
		t.Fatal(err)
	}
	cfg.Progress = io.Discard
	report, err := run(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Rows) != 8 {
		t.Errorf("%d rows", len(report.Rows))
	}
	between := func(what string, v, low, high float64) {
		t.Helper()
		if math.IsNaN(v) || v < low || v > high {
			t.Errorf("%s is %v, not between %v and %v", what, v, low, high)
		}
	}
	for _, row := range report.Rows {
		if len(row.Results) != len(subjectNames) {
			t.Errorf("%s: %d subjects", row.Name, len(row.Results))
		}
		for name, r := range row.Results {
			what := row.Name + " on " + name + ": "
			between(what+"throughput", r.PerSecond, 0.1, 1e7)
			between(what+"median", r.MedianUS, 1, 1e8)
			between(what+"etcd's CPU", r.EtcdUS, 0.01, 1e7)
			between(what+"the client's CPU", r.ClientUS, 0.01, 1e7)
			between(what+"all CPU", r.TotalUS, 0.1, 1e7)
			between(what+"throughput to direct", r.PerSecondToDirect, 0.001, 1000)
			between(what+"all CPU to direct", r.TotalToDirect, 0.001, 1000)
			if name == direct {
				between(what+"the proxy's CPU", r.ProxyUS, 0, 0)
				continue
			}
			between(what+"the proxy's CPU", r.ProxyUS, 0.01, 1e7)
			between(what+"the proxy's CPU to grpc-proxy", r.ProxyToGRPCProxy, 0.001, 1000)
			between(what+"the proxy's CPU to l4", r.ProxyToLayer4, 0.001, 1000)
		}
	}
	for _, name := range []string{layer4, grpcProxy, passing, sealing} {
		between("peak memory of "+name, report.PeakMemoryMiB[name], 1, 4096)
	}

	var text, encoded bytes.Buffer
	if err := report.print(&text); err != nil {
		t.Fatal(err)
	}
	if err := json.NewEncoder(&encoded).Encode(report); err != nil {
		t.Fatal(err)
	}
	for _, row := range report.Rows {
		if !strings.Contains(text.String(), "\n"+row.Name) || !strings.Contains(encoded.String(), `"name":"`+row.Name+`"`) {
			t.Errorf("the report lacks the row %q", row.Name)
		}
	}
}

// TestCPUTime compares with this process' own work.
func TestCPUTime(t *testing.T) {
	before, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); time.Since(start) < 100*time.Millisecond; {
	}
	after, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if d := after - before; d < 5*time.Millisecond || d > 5*time.Second {
		t.Errorf("100 ms of work took %v of CPU", d)
	}
	if _, err := cpuTime(-1); err == nil {
		t.Error("a process that there is not has CPU time")
	}
}

func TestParse(t *testing.T) {
	for _, bad := range []string{"x", "-subjects=nginx", "-rows=(", "-rounds=-1", "-conns=0", "-nonsense"} {
		if _, _, err := parse([]string{bad}); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
	c, asJSON, err := parse([]string{"-json", "-subjects", "direct,l4"})
	if err != nil || !asJSON || !slices.Equal(c.Subjects, []string{direct, layer4}) || c.Rounds < 1 || c.Duration <= 0 {
		t.Errorf("%+v, %v, %v", c, asJSON, err)
	}
}

// TestJoin sends through the relay in both directions and closes one after the other.
func TestJoin(t *testing.T) {
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	front, back := listen(), listen()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if down, err := front.Accept(); err == nil {
			join(down, back.Addr().String())
		}
	}()
	go func() {
		if c, err := back.Accept(); err == nil {
			defer c.Close()
			all, _ := io.ReadAll(c)
			c.Write(append([]byte("got "), all...))
		}
	}()
	c, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(c)
	if err != nil || string(answer) != "got hello" {
		t.Errorf("%q, %v", answer, err)
	}
	<-done
}
