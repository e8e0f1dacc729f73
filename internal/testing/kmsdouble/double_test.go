package kmsdouble

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestStringToSign uses the worked example of the vendor's documentation of RPC signatures.
func TestStringToSign(t *testing.T) {
	text := stringToSign("GET", map[string]string{
		"Timestamp": "2016-02-23T12:46:24Z", "Format": "XML", "AccessKeyId": "testid", "Action": "DescribeRegions", "SignatureMethod": "HMAC-SHA1",
		"SignatureNonce": "3ee8c1b8-83d3-44af-a94f-4e0ad82fd6cf", "Version": "2014-05-26", "SignatureVersion": "1.0", "Signature": "not signed",
	})
	const want = "GET&%2F&AccessKeyId%3Dtestid%26Action%3DDescribeRegions%26Format%3DXML%26SignatureMethod%3DHMAC-SHA1%26" +
		"SignatureNonce%3D3ee8c1b8-83d3-44af-a94f-4e0ad82fd6cf%26SignatureVersion%3D1.0%26Timestamp%3D2016-02-23T12%253A46%253A24Z%26Version%3D2014-05-26"
	if text != want {
		t.Errorf("got  %s\nwant %s", text, want)
	}
	if got := sign(text, "testsecret"); got != "OLeaidS1JvxuMvnyHOwuJ+uX5qY=" {
		t.Errorf("signature %s", got)
	}
	if got := percentEncode("a Z-_.~*+/=ü%"); got != "a%20Z-_.~%2A%2B%2F%3D%C3%BC%25" {
		t.Errorf("encoded as %s", got)
	}
}

// caller is a client of the double that signs as told.
type caller struct {
	t      *testing.T
	d      *Double
	client *http.Client
}

func newCaller(t *testing.T, d *Double) *caller {
	t.Helper()
	pem, err := os.ReadFile(d.CAFile())
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	t.Cleanup(transport.CloseIdleConnections)
	return &caller{t, d, &http.Client{Transport: transport}}
}

// params returns signed parameters; change may alter them, and is done before or after signing.
func (c *caller) params(action string, api map[string]string, before, after func(map[string]string)) map[string]string {
	p := map[string]string{
		"Action": action, "Version": "2016-01-20", "Format": "JSON", "RegionId": c.d.Region(), "AccessKeyId": DefaultAccessKeyID,
		"SignatureMethod": "HMAC-SHA1", "SignatureVersion": "1.0", "SignatureNonce": newUUID(), "Timestamp": formatTime(time.Now()),
	}
	for k, v := range api {
		p[k] = v
	}
	if before != nil {
		before(p)
	}
	p["Signature"] = sign(stringToSign("POST", p), DefaultAccessKeySecret)
	if after != nil {
		after(p)
	}
	return p
}

func (c *caller) post(query map[string]string, form url.Values) (int, map[string]any) {
	c.t.Helper()
	values := url.Values{}
	for k, v := range query {
		values.Set(k, v)
	}
	return c.postRaw(values, form)
}

func (c *caller) postRaw(query, form url.Values) (int, map[string]any) {
	c.t.Helper()
	req, err := http.NewRequestWithContext(c.t.Context(), http.MethodPost, c.d.URL()+"/?"+query.Encode(), strings.NewReader(form.Encode()))
	if err != nil {
		c.t.Fatal(err)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		c.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(text, &fields); err != nil {
		c.t.Fatalf("%s: %v", text, err)
	}
	return resp.StatusCode, fields
}

func (c *caller) expect(name string, params map[string]string, status int, code string) map[string]any {
	c.t.Helper()
	gotStatus, fields := c.post(params, nil)
	got, _ := fields["Code"].(string)
	if gotStatus != status || got != code || fields["RequestId"] == "" {
		c.t.Errorf("%s: HTTP %d, %v; want HTTP %d, code %q", name, gotStatus, fields, status, code)
	}
	return fields
}

func TestVerification(t *testing.T) {
	d := New(t, Config{})
	c := newCaller(t, d)
	describe := map[string]string{"KeyId": DefaultKeyID}
	set := func(name, value string) func(map[string]string) {
		return func(p map[string]string) { p[name] = value }
	}
	c.expect("good", c.params("DescribeKey", describe, nil, nil), 200, "")
	c.expect("changed after signing", c.params("DescribeKey", describe, nil, set("KeyId", DefaultAlias)), 400, "SignatureDoesNotMatch")
	c.expect("added after signing", c.params("DescribeKey", describe, nil, set("Extra", "")), 400, "SignatureDoesNotMatch")
	c.expect("wrong signature", c.params("DescribeKey", describe, nil, set("Signature", "AAAA")), 400, "SignatureDoesNotMatch")
	c.expect("no signature", c.params("DescribeKey", describe, nil, set("Signature", "")), 400, "MissingSignature")
	c.expect("unknown caller", c.params("DescribeKey", describe, set("AccessKeyId", "LTAIother"), nil), 404, "InvalidAccessKeyId.NotFound")
	c.expect("token of nobody", c.params("DescribeKey", describe, set("SecurityToken", "x"), nil), 400, "InvalidSecurityToken.MismatchWithAccessKey")
	c.expect("version", c.params("DescribeKey", describe, set("Version", "2014-01-01"), nil), 400, "InvalidParameter")
	c.expect("format", c.params("DescribeKey", describe, set("Format", "XML"), nil), 400, "InvalidParameter")
	c.expect("region", c.params("DescribeKey", describe, set("RegionId", "cn-beijing"), nil), 400, "InvalidParameter")
	c.expect("timestamp", c.params("DescribeKey", describe, set("Timestamp", "yesterday"), nil), 400, "InvalidTimeStamp.Format")
	c.expect("late", c.params("DescribeKey", describe, set("Timestamp", formatTime(time.Now().Add(-16*time.Minute))), nil), 400, "IllegalTimestamp")
	c.expect("early", c.params("DescribeKey", describe, set("Timestamp", formatTime(time.Now().Add(16*time.Minute))), nil), 400, "IllegalTimestamp")
	c.expect("action", c.params("ReadMind", describe, nil, nil), 404, "InvalidAction.NotFound")
	c.expect("key", c.params("DescribeKey", map[string]string{"KeyId": "key-none"}, nil, nil), 404, "Forbidden.KeyNotFound")
	c.expect("alias", c.params("DescribeKey", map[string]string{"KeyId": "alias/none"}, nil, nil), 404, "Forbidden.AliasNotFound")
	c.expect("other region", c.params("DescribeKey", map[string]string{"KeyId": "acs:kms:cn-beijing:1:key/" + DefaultKeyID}, nil, nil), 404, "Forbidden.KeyNotFound")

	again := c.params("DescribeKey", describe, nil, nil)
	c.expect("first use of the nonce", again, 200, "")
	c.expect("second use of the nonce", again, 400, "SignatureNonceUsed")
	if got := d.Applied("DescribeKey"); got != 2 {
		t.Errorf("%d were carried out", got)
	}
}

func TestOperations(t *testing.T) {
	d := New(t, Config{})
	c := newCaller(t, d)
	plaintext := base64.StdEncoding.EncodeToString([]byte("plaintext"))

	// Parameters in the body are signed with those of the URL.
	p := c.params("Encrypt", map[string]string{"KeyId": DefaultAlias, "Plaintext": plaintext, "EncryptionContext": `{"b":"2","a":"1"}`}, nil, nil)
	form := url.Values{"Plaintext": {p["Plaintext"]}}
	delete(p, "Plaintext")
	status, sealed := c.post(p, form)
	if status != 200 || sealed["KeyId"] != DefaultKeyID {
		t.Fatalf("HTTP %d, %v", status, sealed)
	}
	blob, _ := sealed["CiphertextBlob"].(string)
	d.Rotate(DefaultKeyID)
	opened := c.expect("decrypt", c.params("Decrypt", map[string]string{"CiphertextBlob": blob, "EncryptionContext": `{ "a":"1", "b":"2" }`}, nil, nil), 200, "")
	if opened["Plaintext"] != plaintext || opened["KeyVersionId"] != sealed["KeyVersionId"] {
		t.Errorf("%v", opened)
	}
	c.expect("without context", c.params("Decrypt", map[string]string{"CiphertextBlob": blob}, nil, nil), 400, "InvalidParameter")
	c.expect("odd context", c.params("Decrypt", map[string]string{"CiphertextBlob": blob, "EncryptionContext": "[]"}, nil, nil), 400, "InvalidParameter")
	c.expect("damaged", c.params("Decrypt", map[string]string{"CiphertextBlob": "AAAA"}, nil, nil), 400, "InvalidParameter")

	for spec, size := range map[string]int{"KeySpec=AES_256": 32, "KeySpec=AES_128": 16, "NumberOfBytes=1024": 1024, "": 32} {
		api := map[string]string{"KeyId": DefaultKeyID}
		if name, value, ok := strings.Cut(spec, "="); ok {
			api[name] = value
		}
		fields := c.expect(spec, c.params("GenerateDataKey", api, nil, nil), 200, "")
		text, _ := fields["Plaintext"].(string)
		if raw, err := base64.StdEncoding.DecodeString(text); err != nil || len(raw) != size {
			t.Errorf("%s: %d bytes, %v", spec, len(raw), err)
		}
	}
	c.expect("too many bytes", c.params("GenerateDataKey", map[string]string{"KeyId": DefaultKeyID, "NumberOfBytes": "1025"}, nil, nil), 400, "InvalidParameter")
	c.expect("dry run", c.params("GenerateDataKey", map[string]string{"KeyId": DefaultKeyID, "DryRun": "true"}, nil, nil), 400, "DryRunOperationError")

	versions := c.expect("versions", c.params("ListKeyVersions", map[string]string{"KeyId": DefaultKeyID, "PageSize": "1", "PageNumber": "2"}, nil, nil), 200, "")
	list, _ := versions["KeyVersions"].(map[string]any)["KeyVersion"].([]any)
	if versions["TotalCount"] != 2.0 || len(list) != 1 || DefaultKeyID+"/"+list[0].(map[string]any)["KeyVersionId"].(string) != d.PrimaryKeyID(DefaultKeyID) {
		t.Errorf("%v", versions)
	}
}

// recorder is a TB that remembers what it was told.
type recorder struct {
	*testing.T
	errors  int
	cleanup []func()
}

func (r *recorder) Errorf(string, ...any) { r.errors++ }
func (r *recorder) Cleanup(f func())      { r.cleanup = append(r.cleanup, f) }

// TestMisuseFailsTheTest does what no client should.
func TestMisuseFailsTheTest(t *testing.T) {
	r := &recorder{T: t}
	d := New(r, Config{})
	c := newCaller(t, d)
	c.post(c.params("Encrypt", map[string]string{"KeyId": DefaultKeyID, "Plaintext": "QUFB"}, nil, nil), nil)
	twice := url.Values{}
	for k, v := range c.params("DescribeKey", map[string]string{"KeyId": DefaultKeyID}, nil, nil) {
		twice.Set(k, v)
	}
	twice.Add("KeyId", "key-other")
	if status, fields := c.postRaw(twice, nil); status != 400 {
		t.Errorf("HTTP %d, %v", status, fields)
	}
	if n := len(d.Violations()); n != 2 {
		t.Errorf("%d violations: %q", n, d.Violations())
	}
	c.client.CloseIdleConnections()
	for _, f := range r.cleanup {
		f()
	}
	if r.errors != 2 {
		t.Errorf("the test failed %d times", r.errors)
	}
}

// TestCloseEndsWhatHangs checks that a double can be closed under its clients.
func TestCloseEndsWhatHangs(t *testing.T) {
	d, err := Start(Config{})
	if err != nil {
		t.Fatal(err)
	}
	ca := d.CAFile()
	c := newCaller(t, d)
	d.Inject("", FaultSpec{Kind: Hang}, FaultSpec{Kind: SlowDrip, Interval: time.Hour})
	done := make(chan error, 2)
	for range cap(done) {
		go func() {
			query := url.Values{}
			for k, v := range c.params("DescribeKey", map[string]string{"KeyId": DefaultKeyID}, nil, nil) {
				query.Set(k, v)
			}
			req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, d.URL()+"/?"+query.Encode(), nil)
			if err == nil {
				var resp *http.Response
				if resp, err = c.client.Do(req); err == nil {
					_, err = io.ReadAll(resp.Body)
					_ = resp.Body.Close()
				}
			}
			done <- err
		}()
	}
	for deadline := time.Now().Add(10 * time.Second); d.Pending() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the requests did not come")
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	for range cap(done) {
		if err := <-done; err == nil {
			t.Error("an answer came")
		}
	}
	if _, err := os.Stat(ca); !os.IsNotExist(err) {
		t.Errorf("the CA's file is still there: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}
