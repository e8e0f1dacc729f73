package kmsdouble

import (
	"crypto/rand"
	"encoding/base64"
	"strconv"
	"time"
)

// perform carries out a request.
func (d *Double) perform(r *request) (*result, *apiError) {
	caller, e := d.verify(r.http.Method, r.params)
	if e != nil {
		return nil, e
	}
	d.keysMu.Lock()
	defer d.keysMu.Unlock()
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
	if e := d.mayDo(caller, r.action, r.params["KeyId"]); e != nil { // before the key is looked at
		return nil, e
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
	if e := k.usable(d.now()); e != nil {
		return nil, e
	}
	blob, err := k.seal(plaintext, context)
	if err != nil {
		return nil, &apiError{500, "InternalFailure", "Internal Failure."}
	}
	d.onSecret("a plaintext that Alibaba Cloud KMS wrapped", plaintext)
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
	kept := "Enabled"
	if k.careless {
		kept = "Disabled"
	}
	origin, rotation := "Aliyun_KMS", kept
	if !k.materialExpires.IsZero() {
		origin, rotation = "EXTERNAL", "Disabled" // only the owner has other material
	}
	protected, creator := "SOFTWARE", "154035569884****"
	if k.hsm {
		protected = "HSM"
	}
	if k.product {
		creator = "Ecs"
	}
	version := k.primary().id
	return &result{k.id, version, map[string]any{"KeyMetadata": map[string]any{
		"KeyId": k.id, "KeyState": string(k.stateAt(d.now())), "PrimaryKeyVersion": version, "KeySpec": "Aliyun_AES_256", "KeyUsage": "ENCRYPT/DECRYPT",
		"ProtectionLevel": protected, "Origin": origin, "AutomaticRotation": rotation, "DeletionProtection": kept,
		"CreationDate": formatTime(k.created), "DeleteDate": formatTime(k.deleteAt), "MaterialExpireTime": formatTime(k.materialExpires),
		"LastRotationDate": formatTime(k.primary().created), "Creator": creator, "Description": "",
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
