package reliability

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
)

// report is the result of a run.
type report struct {
	Started    time.Time `json:"started"`
	Seconds    int       `json:"seconds"`
	CPUs       int       `json:"cpus"`
	Go         string    `json:"go"`
	Operations int       `json:"operations"` // with a response
	Unknown    int       `json:"unknown"`    // without a response, or with an error
	Checked    int       `json:"checked"`    // by porcupine
	Registers  int       `json:"registers"`
	Writes     int       `json:"writes"` // to keys that are written once, with a response
	Events     int       `json:"events"`
	Faults     int       `json:"faults"`

	Lost        int `json:"lost"`
	Doubled     int `json:"doubled"`
	Wrong       int `json:"wrong"`
	EventsLost  int `json:"eventsLost"`
	EventsTwice int `json:"eventsTwice"`
	Illegal     int `json:"illegal"` // registers whose results no order explains
	Plaintext   int `json:"plaintext"`

	Files         int   `json:"files"`
	FileBytes     int64 `json:"fileBytes"`
	CapturedBytes int64 `json:"capturedBytes"`
	Cores         int   `json:"cores"`
	CoresWritten  bool  `json:"coresWritten"` // of other programs that crash

	ByFault map[string]*tally `json:"byFault"`
	Notes   map[string]int    `json:"notes"`

	s    *site
	mu   sync.Mutex
	fail func(...any) // how the test learns of a result that is bad
}

// tally is what is known about one fault.
type tally struct {
	Times   int     `json:"times"`
	Slowest float64 `json:"slowestSeconds"` // until all clients had responses again
	Skipped string  `json:"skipped,omitempty"`
}

func newReport(s *site) *report {
	return &report{CPUs: runtime.NumCPU(), Go: runtime.Version(), s: s, fail: s.t.Error, ByFault: make(map[string]*tally), Notes: make(map[string]int)}
}

// tally must be called with mu locked.
func (r *report) tally(fault string) *tally {
	if r.ByFault[fault] == nil {
		r.ByFault[fault] = new(tally)
	}
	return r.ByFault[fault]
}

// times returns how often a fault was made.
func (r *report) times(fault string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.tally(fault).Times
}

// count counts a fault, and how long the clients needed afterwards.
func (r *report) count(fault string, took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	one := r.tally(fault)
	one.Times++
	one.Slowest = max(one.Slowest, took.Seconds())
	r.Faults++
}

// recovered notes a recovery that is not counted as a fault.
func (r *report) recovered(what string, took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	one := r.tally(what)
	one.Slowest = max(one.Slowest, took.Seconds())
}

func (r *report) skip(fault, why string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tally(fault).Skipped = why
}

func (r *report) note(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Notes[what]++
}

// bad counts a fault of the proxy, and fails the test.
func (r *report) bad(counter *int, what string) {
	r.s.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if *counter++; *counter <= 10 {
		r.fail(what)
	}
}

func (r *report) lost(what string)    { r.s.t.Helper(); r.bad(&r.Lost, what) }
func (r *report) doubled(what string) { r.s.t.Helper(); r.bad(&r.Doubled, what) }
func (r *report) wrong(what string)   { r.s.t.Helper(); r.bad(&r.Wrong, what) }

// write writes the figures, and the page if there is one to write.
func (r *report) write() {
	t := r.s.t
	t.Helper()
	r.Seconds = int(time.Since(r.Started).Seconds())
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", r.table())
	if path := os.Getenv("RELIABILITY_RESULTS"); path != "" {
		if err := os.WriteFile(path, append(data, '\n'), 0o600); err != nil {
			t.Error(err)
		}
	}
	path := os.Getenv("RELIABILITY_PAGE")
	if path == "" || t.Failed() {
		return
	}
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const marker = "<!-- make reliability writes the rest of this page. -->\n"
	head, _, ok := strings.Cut(string(page), marker)
	if !ok {
		t.Fatalf("%s has no line %q", path, marker)
	}
	if err := os.WriteFile(path, []byte(head+marker+"\n"+r.table()), 0o600); err != nil {
		t.Fatal(err)
	}
}

// table is the report in Markdown.
func (r *report) table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Run of %s, %d minutes, on %d cores that other work shared, with %s.\n\n", r.Started.UTC().Format("2006-01-02"), (r.Seconds+30)/60, r.CPUs, r.Go)
	cores := fmt.Sprint(r.Cores)
	if !r.CoresWritten {
		cores += ", on a system that writes none of any program"
	}
	fmt.Fprintf(&b, "| result | |\n|---|---|\n")
	for _, row := range []struct {
		what  string
		value any
	}{
		{"faults and changes", r.Faults},
		{"requests with a response", r.Operations},
		{"requests without one, or with an error", r.Unknown},
		{"operations checked by porcupine", r.Checked},
		{"registers and counters", r.Registers},
		{"acknowledged writes of keys that are written once", r.Writes},
		{"watch events of these keys", r.Events},
		{"**acknowledged writes lost**", r.Lost},
		{"**writes applied twice**", r.Doubled},
		{"**wrong values**", r.Wrong},
		{"**histories that are not linearizable**", r.Illegal},
		{"**watch events lost**", r.EventsLost},
		{"**watch events received twice**", r.EventsTwice},
		{"**places with plaintext**", r.Plaintext},
		{"files searched for plaintext: data of etcd, snapshots, logs, metrics, audit logs, core dumps", r.Files},
		{"their size", fmt.Sprintf("%d MB", r.FileBytes/1e6)},
		{"traffic searched: between the proxies and etcd, and between its members", fmt.Sprintf("%d MB", r.CapturedBytes/1e6)},
		{"core dumps found", cores},
	} {
		fmt.Fprintf(&b, "| %s | %v |\n", row.what, row.value)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Notes)) {
		fmt.Fprintf(&b, "| %s | %d |\n", name, r.Notes[name])
	}
	fmt.Fprintf(&b, "\n| fault or change | times | longest until every client got responses to reads and writes again |\n|---|---|---|\n")
	for _, name := range slices.SortedFunc(maps.Keys(r.ByFault), func(a, b string) int {
		// The most frequent ones first.
		return cmp.Or(r.ByFault[b].Times-r.ByFault[a].Times, strings.Compare(a, b))
	}) {
		one := r.ByFault[name]
		times, slowest := fmt.Sprint(one.Times), "–"
		if one.Times == 0 {
			times = "–"
		}
		if one.Slowest > 0 {
			slowest = fmt.Sprintf("%.1f s", one.Slowest)
		}
		if one.Skipped != "" {
			slowest = "skipped: " + one.Skipped
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", name, times, slowest)
	}
	return b.String()
}

// dateOf returns the time that a server sends with a response.
func dateOf(url string) (time.Time, error) {
	client := http.Client{Timeout: 5 * time.Second}
	response, err := client.Get(url)
	if err != nil {
		return time.Time{}, err
	}
	defer response.Body.Close()
	return http.ParseTime(response.Header.Get("Date"))
}
