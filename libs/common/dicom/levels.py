"""Which attributes the archive keeps in its documents, and at which level of the information model.

The keys of PS3.4 C.6 (optional ones among them) and of PS3.18 10.6.3, and what people search for and look at.
Specific Character Set is left out on purpose: documents are Unicode, each answer states its own.
"""

from __future__ import annotations

from pydicom.datadict import tag_for_keyword


def _tags(keywords: str) -> frozenset[int]:
    found = set()
    for keyword in keywords.split():
        tag = tag_for_keyword(keyword)
        if tag is None:
            raise ValueError(f"{keyword} is not in the data dictionary (PS3.6)")
        found.add(int(tag))
    return frozenset(found)


PATIENT: frozenset[int] = _tags("""
    PatientName PatientID IssuerOfPatientID TypeOfPatientID IssuerOfPatientIDQualifiersSequence
    PatientBirthDate PatientBirthTime PatientSex OtherPatientIDs OtherPatientIDsSequence OtherPatientNames
    PatientBirthName PatientMotherBirthName PatientAddress PatientTelephoneNumbers EthnicGroup PatientComments
    PatientSpeciesDescription PatientSpeciesCodeSequence PatientBreedDescription PatientBreedCodeSequence
    ResponsiblePerson ResponsiblePersonRole ResponsibleOrganization
    PatientIdentityRemoved DeidentificationMethod QualityControlSubject ReferencedPatientSequence
    MilitaryRank BranchOfService CountryOfResidence RegionOfResidence PatientReligiousPreference
    ClinicalTrialSponsorName ClinicalTrialProtocolID ClinicalTrialProtocolName ClinicalTrialSiteID
    ClinicalTrialSiteName ClinicalTrialSubjectID ClinicalTrialSubjectReadingID
""")
"""PS3.4 Tables C.6-1 and the Patient module (PS3.3 C.7.1.1)."""

STUDY: frozenset[int] = _tags("""
    StudyInstanceUID StudyID StudyDate StudyTime AccessionNumber IssuerOfAccessionNumberSequence
    ReferringPhysicianName ReferringPhysicianIdentificationSequence ReferringPhysicianTelephoneNumbers
    ConsultingPhysicianName PhysiciansOfRecord NameOfPhysiciansReadingStudy
    StudyDescription ProcedureCodeSequence ReasonForPerformedProcedureCodeSequence
    RequestingService RequestingPhysician RequestedProcedureDescription RequestedProcedureCodeSequence
    ReferencedStudySequence AdmissionID IssuerOfAdmissionIDSequence AdmittingDiagnosesDescription
    AdmittingDiagnosesCodeSequence PatientAge PatientSize PatientWeight PatientBodyMassIndex Occupation
    AdditionalPatientHistory MedicalAlerts Allergies SmokingStatus PregnancyStatus LastMenstrualDate PatientState
    PatientSexNeutered PatientInstitutionResidence CurrentPatientLocation ServiceEpisodeID
    ServiceEpisodeDescription ReasonForStudy StudyComments TimezoneOffsetFromUTC
    ClinicalTrialTimePointID ClinicalTrialTimePointDescription
""")
"""PS3.4 Table C.6-2 and the General Study and Patient Study modules (PS3.3 C.7.2)."""

SERIES: frozenset[int] = _tags("""
    SeriesInstanceUID Modality SeriesNumber SeriesDescription SeriesDescriptionCodeSequence SeriesDate SeriesTime
    Laterality BodyPartExamined AnatomicRegionSequence PatientPosition ProtocolName PerformingPhysicianName
    OperatorsName Manufacturer ManufacturerModelName DeviceSerialNumber SoftwareVersions StationName
    InstitutionName InstitutionAddress InstitutionalDepartmentName InstitutionCodeSequence
    InstitutionalDepartmentTypeCodeSequence TimezoneOffsetFromUTC
    PerformedProcedureStepID PerformedProcedureStepDescription PerformedProcedureStepStartDate
    PerformedProcedureStepStartTime PerformedProcedureStepEndDate PerformedProcedureStepEndTime
    PerformedStationAETitle PerformedProtocolCodeSequence CommentsOnThePerformedProcedureStep
    RequestAttributesSequence ReferencedPerformedProcedureStepSequence FrameOfReferenceUID
    PositionReferenceIndicator BodyPartThickness ScanningSequence SequenceVariant
    MagneticFieldStrength SpatialResolution PresentationIntentType
    ClinicalTrialSeriesID ClinicalTrialSeriesDescription ClinicalTrialCoordinatingCenterName
    TreatmentSessionUID
""")
"""PS3.4 Table C.6-3 and the General Series and Equipment modules (PS3.3 C.7.3, C.7.5)."""

INSTANCE: frozenset[int] = _tags("""
    SOPClassUID SOPInstanceUID RelatedGeneralSOPClassUID InstanceNumber AcquisitionNumber AcquisitionUID
    ImageType InstanceCreationDate InstanceCreationTime InstanceCreatorUID
    ContentDate ContentTime AcquisitionDate AcquisitionTime AcquisitionDateTime TimezoneOffsetFromUTC
    Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation SamplesPerPixel PhotometricInterpretation
    PlanarConfiguration NumberOfFrames FrameTime CineRate RecommendedDisplayFrameRate PixelSpacing
    ImagerPixelSpacing NominalScannedPixelSpacing PixelAspectRatio WindowCenter WindowWidth
    WindowCenterWidthExplanation RescaleIntercept RescaleSlope RescaleType VOILUTFunction PresentationLUTShape
    LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod BurnedInAnnotation
    SliceLocation SliceThickness SpacingBetweenSlices ImagePositionPatient ImageOrientationPatient
    FrameOfReferenceUID ImageLaterality ViewPosition ViewCodeSequence ImageComments ImagesInAcquisition
    KVP ExposureTime XRayTubeCurrent Exposure ConvolutionKernel ContrastBolusAgent
    EchoTime RepetitionTime FlipAngle EchoNumbers ReferencedImageSequence SourceImageSequence
    ReferencedInstanceSequence ReferencedSeriesSequence ReferencedPerformedProcedureStepSequence
    ReferencedRequestSequence ConceptNameCodeSequence CompletionFlag CompletionFlagDescription VerificationFlag
    VerifyingObserverSequence PredecessorDocumentsSequence ContentTemplateSequence ContentLabel
    ContentDescription ContentCreatorName PresentationCreationDate PresentationCreationTime
    DocumentTitle MIMETypeOfEncapsulatedDocument EncapsulatedDocumentLength SourceInstanceSequence
    ObservationDateTime StructureSetLabel StructureSetName StructureSetDate StructureSetTime RTPlanLabel RTPlanName
    RTPlanDate RTPlanTime DoseUnits DoseType DoseSummationType ReviewDate ReviewTime ApprovalStatus
    DerivationDescription ContainerIdentifier SpecimenDescriptionSequence TotalPixelMatrixColumns
    TotalPixelMatrixRows InstanceOriginStatus SOPAuthorizationDateTime AvailableTransferSyntaxUID
    TimeOfLastCalibration DateOfLastCalibration
""")
"""PS3.4 Table C.6-4 and what a list of instances or a viewer shows of each one."""

ALL: frozenset[int] = PATIENT | STUDY | SERIES | INSTANCE
"""Every tag that is kept anywhere: what a reader of headers has to look for."""
