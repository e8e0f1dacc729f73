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
	burnIfAsked()
	os.Exit(m.Run())
}

// TestShort is `go run . -short`, with its figures checked: every row has been measured on every
// subject, and nothing is zero, negative or absurd.
func TestShort(t *testing.T) {
	cfg, _, err := parse([]string{"-short", "-busy", "1"})
	if err != nil {
		t.Fatal(err)
	}
	cfg.Progress = io.Discard
	report, err := run(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Rows) != len(rows(cfg)) {
		t.Errorf("%d rows", len(report.Rows))
	}
	between := func(what string, v, low, high float64) {
		t.Helper()
		if math.IsNaN(v) || v < low || v > high {
			t.Errorf("%s is %v, not between %v and %v", what, v, low, high)
		}
	}
	for _, row := range report.Rows {
		if len(row.Results) != len(cfg.Subjects) {
			t.Errorf("%s: %d subjects", row.Name, len(row.Results))
		}
		for name, r := range row.Results {
			what := row.Name + " on " + name + ": "
			between(what+"throughput", r.PerSecond, 0.1, 1e7)
			between(what+"p50", r.P50US, 1, 1e8)
			between(what+"p99", r.P99US, r.P50US, 1e8)
			between(what+"etcd's CPU", r.EtcdUS, 0.01, 1e7)
			between(what+"the client's CPU", r.ClientUS, 0.01, 1e7)
			between(what+"all CPU", r.TotalUS, 0.1, 1e7)
			between(what+"throughput to direct", r.PerSecondToDirect.Median, 0.001, 1000)
			between(what+"all CPU to direct", r.TotalToDirect.Median, 0.001, 1000)
			if name == direct {
				between(what+"the proxy's CPU", r.ProxyUS, 0, 0)
				continue
			}
			between(what+"the proxy's CPU", r.ProxyUS, 0.01, 1e7)
			between(what+"the proxy's CPU to grpc-proxy", r.ProxyToGRPCProxy.Median, 0.001, 1000)
			between(what+"the proxy's CPU to l4", r.ProxyToLayer4.Median, 0.001, 1000)
			between(what+"peak memory", r.PeakMiB, 1, 4096)
			if name == passing || name == encrypting {
				between(what+"allocations", *r.Allocations, 0, 1e6)
			}
		}
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

// TestRatio compares two subjects round by round.
func TestRatio(t *testing.T) {
	a := &Result{rounds: []figures{{proxy: 2}, {proxy: 9}, {proxy: 4}}}
	b := &Result{rounds: []figures{{proxy: 1}, {proxy: 3}, {proxy: 4}}}
	if r := ratio(a, b, proxyCPU); *r != (Ratio{Median: 2, Low: 1, High: 3}) {
		t.Errorf("%+v", r)
	}
	if r := ratio(a, nil, proxyCPU); r != nil || r.String() != "–" {
		t.Errorf("%+v", r)
	}
	if m := median([]float64{4, 1, 3, 2}); m != 2.5 {
		t.Errorf("median %v", m)
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
	for _, bad := range []string{"x", "-subjects=nginx", "-rows=(", "-rounds=-1", "-conns=0", "-busy=-1", "-nonsense"} {
		if _, _, err := parse([]string{bad}); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
	c, asJSON, err := parse([]string{"-json", "-subjects", "direct,l4", "-base", "other"})
	if err != nil || !asJSON || !slices.Equal(c.Subjects, []string{direct, layer4, basePassing, baseEncrypting}) || c.Rounds < 1 || c.Duration <= 0 {
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
