package kmsdouble

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

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
func (d *Double) serve(w http.ResponseWriter, hr *http.Request) {
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

func (d *Double) answerError(w http.ResponseWriter, r *request, record Record, e *apiError) {
	record.Code, record.Status = e.code, e.status
	d.remember(record)
	writeError(w, r, e)
}

// remember comes before the answer, so that a client that has its answer finds the record.
func (d *Double) remember(record Record) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.records = append(d.records, record)
	if record.Status == 200 {
		d.applied[record.Action]++
	}
}

// parse reads the parameters, and notes what no client should do.
func (d *Double) parse(r *request) *apiError {
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
	if _, ok := query["Plaintext"]; ok {
		d.violate("%s carried its plaintext in the URL", r.action)
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

// perform carries out a request.
func (d *Double) perform(r *request) (*result, *apiError) {
	if e := d.verify(r.http, r.params); e != nil {
		return nil, e
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var do func(map[string]string) (*result, *apiError)
	managed := false
	switch r.action {
	case "GenerateDataKey":
		do = d.generateDataKey
	case "Encrypt":
		do = d.encrypt
	case "Decrypt":
		do = d.decrypt
	case "DescribeKey":
		do, managed = d.describeKey, true
	case "ListKeyVersions":
		do, managed = d.listKeyVersions, true
	}
	if do == nil {
		return nil, &apiError{404, "InvalidAction.NotFound", "The specified action is not found, please check your URL."}
	}
	if managed && d.dedicated {
		return nil, &apiError{400, "UnsupportedOperation", "This operation is not supported."}
	}
	result, e := do(r.params)
	if e == nil && r.params["DryRun"] == "true" {
		return nil, &apiError{400, "DryRunOperationError", "The request is a dry run and would have succeeded."}
	}
	return result, e
}

func (d *Double) generateDataKey(p map[string]string) (*result, *apiError) {
	size := 0
	switch spec, number := p["KeySpec"], p["NumberOfBytes"]; {
	case number != "":
		n, err := strconv.Atoi(number)
		if err != nil || n < 1 || n > 1024 {
			return nil, invalidParameter("NumberOfBytes")
		}
		size = n
	case spec == "" || spec == "AES_256":
		size = 32
	case spec == "AES_128":
		size = 16
	default:
		return nil, invalidParameter("KeySpec")
	}
	plaintext := make([]byte, size)
	_, _ = rand.Read(plaintext)
	result, e := d.wrap(p, plaintext)
	if e == nil {
		result.fields["Plaintext"] = base64.StdEncoding.EncodeToString(plaintext)
	}
	return result, e
}

func (d *Double) encrypt(p map[string]string) (*result, *apiError) {
	if p["Plaintext"] == "" {
		return nil, missing("Plaintext")
	}
	plaintext, err := base64.StdEncoding.DecodeString(p["Plaintext"])
	if err != nil || len(plaintext) > 6<<10 {
		return nil, invalidParameter("Plaintext")
	}
	return d.wrap(p, plaintext)
}

func (d *Double) wrap(p map[string]string, plaintext []byte) (*result, *apiError) {
	k, e := d.find(p["KeyId"])
	if e != nil {
		return nil, e
	}
	context, e := canonicalContext(p["EncryptionContext"])
	if e != nil {
		return nil, e
	}
	if e := k.usable(); e != nil {
		return nil, e
	}
	blob, err := k.seal(plaintext, context)
	if err != nil {
		return nil, &apiError{500, "InternalFailure", "Internal Failure."}
	}
	version := k.primary().id
	return &result{k.id, version, map[string]any{"KeyId": k.id, "KeyVersionId": version, "CiphertextBlob": blob}}, nil
}

func (d *Double) decrypt(p map[string]string) (*result, *apiError) {
	if p["CiphertextBlob"] == "" {
		return nil, missing("CiphertextBlob")
	}
	context, e := canonicalContext(p["EncryptionContext"])
	if e != nil {
		return nil, e
	}
	k, v, plaintext, e := d.open(p["CiphertextBlob"], context)
	if e != nil {
		return nil, e
	}
	return &result{k.id, v.id, map[string]any{
		"KeyId": k.id, "KeyVersionId": v.id, "Plaintext": base64.StdEncoding.EncodeToString(plaintext),
	}}, nil
}

// describeKey works in any state of the key.
func (d *Double) describeKey(p map[string]string) (*result, *apiError) {
	k, e := d.find(p["KeyId"])
	if e != nil {
		return nil, e
	}
	protection := "Disabled"
	if k.deletionProtection {
		protection = "Enabled"
	}
	origin := "Aliyun_KMS"
	if !k.materialExpires.IsZero() {
		origin = "EXTERNAL"
	}
	version := k.primary().id
	return &result{k.id, version, map[string]any{"KeyMetadata": map[string]any{
		"KeyId": k.id, "KeyState": string(k.state), "PrimaryKeyVersion": version, "KeySpec": "Aliyun_AES_256", "KeyUsage": "ENCRYPT/DECRYPT",
		"ProtectionLevel": "SOFTWARE", "Origin": origin, "AutomaticRotation": "Disabled", "DeletionProtection": protection,
		"CreationDate": formatTime(k.created), "DeleteDate": formatTime(k.deleteAt), "MaterialExpireTime": formatTime(k.materialExpires),
		"LastRotationDate": formatTime(k.primary().created), "Creator": "154035569884****", "Description": "",
		"Arn": "acs:kms:" + d.region + ":154035569884****:key/" + k.id,
	}}}, nil
}

func (d *Double) listKeyVersions(p map[string]string) (*result, *apiError) {
	k, e := d.find(p["KeyId"])
	if e != nil {
		return nil, e
	}
	page, size := 1, 10
	for name, target := range map[string]*int{"PageNumber": &page, "PageSize": &size} {
		if p[name] == "" {
			continue
		}
		n, err := strconv.Atoi(p[name])
		if err != nil || n < 1 || n > 100 {
			return nil, invalidParameter(name)
		}
		*target = n
	}
	from := min((page-1)*size, len(k.versions))
	versions := []map[string]any{}
	for _, v := range k.versions[from:min(from+size, len(k.versions))] {
		versions = append(versions, map[string]any{"KeyId": k.id, "KeyVersionId": v.id, "CreationDate": formatTime(v.created)})
	}
	return &result{k.id, "", map[string]any{
		"KeyVersions": map[string]any{"KeyVersion": versions}, "TotalCount": len(k.versions), "PageNumber": page, "PageSize": size,
	}}, nil
}

func invalidParameter(name string) *apiError {
	return &apiError{400, "InvalidParameter", "The specified parameter " + name + " is not valid."}
}

func formatTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05Z")
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
