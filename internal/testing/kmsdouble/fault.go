package kmsdouble

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// Kind is a kind of fault.
type Kind string

// The kinds of faults. Those that speak of "the answer" spoil the real one, so the request is
// carried out first, whatever FaultSpec.Applied says; for the others Applied chooses.
const (
	Throttle Kind = "throttle" // 429 Rejected.Throttling
	// ServerError: 503 ServiceUnavailableTemporary, or the Status and Code given
	ServerError Kind = "server error"
	ErrorCode   Kind = "error code" // the Status and Code given, 400 by default
	// EchoError: like ErrorCode, with the whole request quoted in every text
	EchoError   Kind = "echo error"
	NumericCode Kind = "numeric code" // an error whose "Code" is a number; 400 by default
	HTML        Kind = "HTML"         // an HTML page, with the Status given or 200
	EmptyAnswer Kind = "empty answer" // the Status given or 200, without a body
	// Redirect: 307 to Location, by default to another path of the double
	Redirect Kind = "redirect"
	TooLarge Kind = "too large" // JSON of 2 MiB
	Raw      Kind = "raw"       // the Body given, with the Status given or 200
	// Hang: no answer until Release is closed; then as without a fault
	Hang          Kind = "hang"
	Cut           Kind = "cut"            // the connection is closed without an answer
	CutAnswer     Kind = "cut answer"     // the connection is closed in the middle of the answer
	PartialAnswer Kind = "partial answer" // the answer without its Fields
	ForgedAnswer  Kind = "forged answer"  // the answer with other values, see Set
	WrongKeyID    Kind = "wrong key ID"   // the answer, naming another key
	SlowDrip      Kind = "slow drip"      // the answer, a byte each Interval
)

// FaultSpec describes what to do to a request or its answer.
type FaultSpec struct {
	Kind Kind
	// Applied carries the request out before the fault: applied, but reported as failed. Without it
	// nothing was done.
	Applied  bool
	Status   int             // HTTP status, where the kind allows one
	Code     string          // the vendor's error code, where the kind has one
	Fields   []string        // PartialAnswer: the fields that are left out
	Body     []byte          // Raw
	Set      map[string]any  // ForgedAnswer: the fields that are replaced or added
	Location string          // Redirect
	Release  <-chan struct{} // Hang; nil for ever
	Interval time.Duration   // SlowDrip; 10 ms by default
	// only for a connection that has served a request before: a stale keep-alive
	Reused bool
	Header map[string]string // further headers of the answer
}

// SetFault sets a hook that is called for each request without an injected fault; nil
// removes it. The hook may be called concurrently, and returns nil to let a request pass.
func (d *rpc) SetFault(hook func(*http.Request) *FaultSpec) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault = hook
}

// Inject queues faults for the next requests of an action ("" for any), one each.
func (d *rpc) Inject(action string, faults ...FaultSpec) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.queue[action] = append(d.queue[action], faults...)
}

// Pending returns how many injected faults no request has met yet.
func (d *rpc) Pending() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for _, q := range d.queue {
		n += len(q)
	}
	return n
}

// ClearFaults removes the hook and all queued faults.
func (d *rpc) ClearFaults() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault = nil
	clear(d.queue)
}

// nextFault returns the fault for a request, or nil.
func (d *rpc) nextFault(r *http.Request, action string, reused bool) *FaultSpec {
	d.mu.Lock()
	for _, name := range []string{action, ""} {
		if q := d.queue[name]; len(q) > 0 && (reused || !q[0].Reused) {
			d.queue[name] = q[1:]
			d.mu.Unlock()
			return &q[0]
		}
	}
	hook := d.fault
	d.mu.Unlock()
	if hook == nil {
		return nil
	}
	if f := hook(r); f != nil && (reused || !f.Reused) {
		return f
	}
	return nil
}

// spoilsAnswer reports whether the fault needs the real answer.
func (f *FaultSpec) spoilsAnswer() bool {
	switch f.Kind {
	case CutAnswer, PartialAnswer, ForgedAnswer, WrongKeyID, SlowDrip:
		return true
	}
	return f.Applied
}

// replace answers a request by the fault alone. The kinds that need the real answer do not come
// here.
func (d *rpc) replace(w http.ResponseWriter, r *request, f *FaultSpec) {
	switch f.Kind {
	case Throttle:
		writeError(w, r, &apiError{cmp.Or(f.Status, 429), cmp.Or(f.Code, "Rejected.Throttling"), "Request was denied due to request throttling."})
	case ServerError:
		writeError(w, r, &apiError{cmp.Or(f.Status, 503), cmp.Or(f.Code, "ServiceUnavailableTemporary"), "Service Unavailable Temporary."})
	case ErrorCode:
		writeError(w, r, &apiError{cmp.Or(f.Status, 400), cmp.Or(f.Code, "InvalidParameter"), "The specified parameter is not valid."})
	case EchoError:
		echo := r.http.URL.RawQuery + "\n" + r.body + "\n" + stringToSign(r.http.Method, r.params)
		for _, k := range sortedKeys(r.params) {
			echo += "\n" + r.params[k]
		}
		writeJSON(w, cmp.Or(f.Status, 400), map[string]any{
			"Code": cmp.Or(f.Code, r.params["SecurityToken"], r.params["AccessKeyId"]), "Message": echo, "Recommend": echo, "HostId": echo, "RequestId": echo,
		})
	case NumericCode:
		writeJSON(w, cmp.Or(f.Status, 400), map[string]any{"Code": 400, "Message": "The specified parameter is not valid.", "RequestId": r.id, "HostId": r.http.Host})
	case HTML:
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(cmp.Or(f.Status, 200))
		fmt.Fprintf(w, "<html><body><h1>Sorry</h1><p>%s</p></body></html>", r.http.URL.RawQuery)
	case EmptyAnswer:
		w.WriteHeader(cmp.Or(f.Status, 200))
	case Redirect:
		w.Header().Set("Location", cmp.Or(f.Location, d.URL()+"/elsewhere"))
		w.WriteHeader(cmp.Or(f.Status, 307))
	case Raw:
		w.WriteHeader(cmp.Or(f.Status, 200))
		_, _ = w.Write(f.Body)
	case TooLarge:
		writeJSON(w, cmp.Or(f.Status, 200), map[string]any{"RequestId": r.id, "Padding": strings.Repeat("x", 2<<20)})
	case Cut:
		d.cut(w, nil)
	default:
		d.violate("fault of an unknown kind %q", f.Kind)
		w.WriteHeader(500)
	}
}

// spoil answers a request that was carried out with what the fault makes of its answer.
func (d *rpc) spoil(w http.ResponseWriter, r *request, f *FaultSpec, status int, fields map[string]any) {
	switch f.Kind {
	case CutAnswer:
		body, _ := json.Marshal(fields)
		d.cut(w, append([]byte(fmt.Sprintf("HTTP/1.1 %d Spoiled\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", status, len(body))), body[:len(body)/2]...))
	case PartialAnswer:
		for _, name := range f.Fields {
			delete(fields, name)
			if m, ok := fields["KeyMetadata"].(map[string]any); ok {
				delete(m, name)
			}
		}
		writeJSON(w, status, fields)
	case ForgedAnswer:
		forge(fields, f.Set)
		writeJSON(w, status, fields)
	case WrongKeyID:
		forge(fields, map[string]any{"KeyId": "key-another0000000000000"})
		writeJSON(w, status, fields)
	case SlowDrip:
		d.drip(w, r, f, status, fields)
	case Hang:
		d.hang(r, f)
		writeJSON(w, status, fields)
	default:
		d.replace(w, r, f)
	}
}

// forge replaces fields, in an answer's KeyMetadata where it has one.
func forge(fields, set map[string]any) {
	target := fields
	if m, ok := fields["KeyMetadata"].(map[string]any); ok {
		target = m
	}
	for k, v := range set {
		target[k] = v
	}
}

// hang waits for the fault's end. If the client's or the double's comes first, the request is not
// answered at all.
func (d *rpc) hang(r *request, f *FaultSpec) {
	select {
	case <-f.Release:
	case <-r.http.Context().Done():
		panic(http.ErrAbortHandler)
	case <-d.stopped:
		panic(http.ErrAbortHandler)
	}
}

// drip writes the answer a byte at a time.
func (d *rpc) drip(w http.ResponseWriter, r *request, f *FaultSpec, status int, fields map[string]any) {
	body, _ := json.Marshal(fields)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	tick := time.NewTicker(cmp.Or(f.Interval, 10*time.Millisecond))
	defer tick.Stop()
	for i := range body {
		select {
		case <-tick.C:
		case <-r.http.Context().Done():
			panic(http.ErrAbortHandler)
		case <-d.stopped:
			panic(http.ErrAbortHandler)
		}
		if _, err := w.Write(body[i : i+1]); err != nil {
			panic(http.ErrAbortHandler)
		}
		if err := http.NewResponseController(w).Flush(); err != nil {
			panic(http.ErrAbortHandler)
		}
	}
}
