package kmsdouble

import (
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Record is what a double remembers of a request, as the vendor's audit trail would.
type Record struct {
	Time      time.Time
	RequestID string
	Action    string
	KeyID     string // of the key that was used, if it came so far
	Version   string
	Code      string // "" for success
	Status    int    // HTTP status of the operation, whatever a fault made of the answer
	Fault     Kind   // "" for none
	Body      bool   // the parameters came in the body
}

// rpc speaks the vendor's RPC protocol: it parses, counts and remembers requests, and spoils
// answers. What an action does is the product's.
type rpc struct {
	*server
	*gate
	perform func(*request) (*result, *apiError)
	inBody  []string // parameters that must not travel in the URL

	mu      sync.Mutex
	calls   map[string]int
	applied map[string]int
	records []Record
	fault   func(*http.Request) *FaultSpec
	queue   map[string][]FaultSpec // by action; "" for any
}

func newRPC(g *gate, perform func(*request) (*result, *apiError), inBody ...string) *rpc {
	return &rpc{gate: g, perform: perform, inBody: inBody, calls: map[string]int{}, applied: map[string]int{}, queue: map[string][]FaultSpec{}}
}

// Calls returns how many requests named the action, whatever became of them.
func (d *rpc) Calls(action string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls[action]
}

// Applied returns how many requests of the action were carried out, even if a fault then spoiled
// the answer.
func (d *rpc) Applied(action string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.applied[action]
}

// CallCounts returns the number of requests by action.
func (d *rpc) CallCounts() map[string]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.calls)
}

// Records returns what the double remembers of each request, oldest first.
func (d *rpc) Records() []Record {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.records)
}

// connKey is the context key of a connection's connState.
type connKey struct{}

// connState counts the requests of a connection.
type connState struct{ requests atomic.Int64 }

// request is a request as the double sees it.
type request struct {
	http   *http.Request
	id     string // the request ID of the answer
	params map[string]string
	body   string
	action string
}

// serve handles one request.
func (d *rpc) serve(w http.ResponseWriter, hr *http.Request) {
	d.serving.Add(1) // a cut connection no longer counts while its request ends
	defer d.serving.Done()
	r := &request{http: hr, id: strings.ToUpper(newUUID())}
	record := Record{Time: d.now(), RequestID: r.id}
	e := d.parse(r)
	record.Action, record.Body = r.action, r.body != ""
	if e != nil {
		d.answerError(w, r, record, e)
		return
	}
	state, _ := hr.Context().Value(connKey{}).(*connState)
	f := d.nextFault(hr, r.action, state.requests.Add(1) > 1)
	late := f != nil && f.Kind == Hang && !f.Applied
	if f != nil {
		record.Fault = f.Kind
		for k, v := range f.Header {
			w.Header().Set(k, v)
		}
		if !late && !f.spoilsAnswer() {
			d.remember(record)
			d.replace(w, r, f)
			return
		}
	}
	if late {
		d.hang(r, f)
	}
	result, e := d.perform(r)
	if e != nil {
		d.answerError(w, r, record, e)
		return
	}
	record.Status, record.KeyID, record.Version = 200, result.keyID, result.version
	d.remember(record)
	result.fields["RequestId"] = r.id
	if f != nil && !late {
		d.spoil(w, r, f, 200, result.fields)
		return
	}
	writeJSON(w, 200, result.fields)
}

func (d *rpc) answerError(w http.ResponseWriter, r *request, record Record, e *apiError) {
	record.Code, record.Status = e.code, e.status
	d.remember(record)
	writeError(w, r, e)
}

// remember comes before the answer, so that a client that has its answer finds the record.
func (d *rpc) remember(record Record) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.records = append(d.records, record)
	if record.Status == 200 {
		d.applied[record.Action]++
	}
}

// parse reads the parameters, and notes what no client should do.
func (d *rpc) parse(r *request) *apiError {
	body, err := io.ReadAll(io.LimitReader(r.http.Body, 1<<20))
	if err != nil {
		return &apiError{400, "InvalidParameter", "The body cannot be read."}
	}
	r.body = string(body)
	query, err := url.ParseQuery(r.http.URL.RawQuery)
	if err != nil {
		return &apiError{400, "InvalidParameter", "The query cannot be parsed."}
	}
	form, err := url.ParseQuery(r.body)
	if err != nil {
		return &apiError{400, "InvalidParameter", "The body cannot be parsed."}
	}
	r.params = map[string]string{}
	for _, values := range []url.Values{query, form} {
		for k, v := range values {
			if _, twice := r.params[k]; twice || len(v) != 1 {
				d.violate("parameter %s was given twice", k)
				return &apiError{400, "InvalidParameter", "A parameter was given twice."}
			}
			r.params[k] = v[0]
		}
	}
	r.action = r.params["Action"]
	d.mu.Lock()
	d.calls[r.action]++
	d.mu.Unlock()
	for _, name := range d.inBody {
		if _, ok := query[name]; ok {
			d.violate("%s carried its %s in the URL", r.action, name)
		}
	}
	if r.http.Header.Get("Referer") != "" || r.http.URL.Path != "/" {
		d.violate("%s followed a redirect or went to another path", r.action)
	}
	if r.http.Method != http.MethodPost {
		d.violate("%s came as %s", r.action, r.http.Method)
		return &apiError{405, "UnsupportedHTTPMethod", "This http method is not supported."}
	}
	return nil
}

// result is a successful answer without its request ID, and the key that was used.
type result struct {
	keyID, version string
	fields         map[string]any
}

func writeError(w http.ResponseWriter, r *request, e *apiError) {
	writeJSON(w, e.status, map[string]any{
		"RequestId": r.id, "HostId": r.http.Host, "Code": e.code, "Message": e.message,
		"Recommend": "https://api.aliyun.com/troubleshoot?q=" + e.code + "&product=Kms&requestId=" + r.id,
	})
}

func writeJSON(w http.ResponseWriter, status int, fields map[string]any) {
	body, err := json.Marshal(fields)
	if err != nil {
		http.Error(w, "encode answer", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json;charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(body)
}
