package harness

import (
	"encoding/json"
	"os"
	"regexp"
	"testing"
)

// Tested is one cell of the tables in docs/design/compatibility.md, which contain what passed.
// Tests write them to the folder COMPATIBILITY_RESULTS as lines of JSON.
type Tested struct {
	// Row is a gRPC method, /service/method, or an HTTP method and a path.
	Row string `json:"row"`
	// Column is an etcd or a client, with its version.
	Column string `json:"column"`
	// Absent says that this etcd does not have the method, and that the proxy responds in the same
	// way.
	Absent bool `json:"absent,omitempty"`
}

// RecordTested records cells when the test ends, if it has passed.
func RecordTested(tb testing.TB, cells func() []Tested) {
	tb.Helper()
	dir := os.Getenv("COMPATIBILITY_RESULTS")
	if dir == "" {
		return
	}
	tb.Cleanup(func() {
		if tb.Failed() || tb.Skipped() {
			return
		}
		file, err := os.CreateTemp(dir, "*.jsonl")
		if err != nil {
			tb.Errorf("record what was tested: %v", err)
			return
		}
		defer file.Close()
		out := json.NewEncoder(file)
		for _, c := range cells() {
			if err := out.Encode(c); err != nil {
				tb.Errorf("record what was tested: %v", err)
			}
		}
	})
}

var answered = regexp.MustCompile(`(?m)^grpc_server_msg_sent_total\{grpc_method="(\w+)",grpc_service="([\w.]+)",[^}]*\} (\d+)`)

// RecordTested records, when the test ends, that the proxy has answered every method whose
// responses its metrics count, for a column.
func (p *Proxy) RecordTested(column string) {
	p.env.TB.Helper()
	RecordTested(p.env.TB, func() (cells []Tested) {
		if p.Process == nil || p.Alive() != nil {
			p.env.TB.Errorf("record what was tested with %s: the proxy has ended", column)
			return nil
		}
		for _, m := range answered.FindAllStringSubmatch(p.Scrape(), -1) {
			if m[3] != "0" {
				cells = append(cells, Tested{Row: "/" + m[2] + "/" + m[1], Column: column})
			}
		}
		return cells
	})
}
